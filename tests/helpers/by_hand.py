"""Hard masks with straight-through gradients as a plain loop, for any optimizers and windows."""

import torch
from torch import nn

from tests.helpers.models import BATCHES, Classifier, Loader, make_net
from tests.reference.training import largest


class Windows(Classifier):
    """Steps each of its optimizers at the end of windows of their own lengths, the last of which may be incomplete.

    Args:
        make_optimizers: Makes them from the parameters by name.
        windows: Batches in a window of each.
    """

    def __init__(self, make_optimizers, windows=(1, 1)):
        super().__init__(make_net(norm=False, dropout=0.0))
        self.make_optimizers, self.windows, self.automatic_optimization = make_optimizers, windows, False

    def configure_optimizers(self):
        return self.make_optimizers(dict(self.net.named_parameters()))

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.compute_loss(batch))
        optimizers = self.optimizers()
        step_due(optimizers if isinstance(optimizers, list) else [optimizers], self.windows, batch_idx)


def step_due(optimizers, windows, batch_idx):
    for optimizer, window in zip(optimizers, windows, strict=False):
        if (batch_idx + 1) % window == 0 or batch_idx + 1 == BATCHES:
            optimizer.step()
            optimizer.zero_grad()


def train_by_hand(model, dtype=torch.float32, sparsity=0.6):
    """The same as a plain loop over dense parameters, with the largest of them as inputs of the network.

    Returns:
        Parameter and mask of each weight, by its name in the network.
    """
    model.to(dtype)
    optimizers, parameters = model.configure_optimizers(), dict(model.net.named_parameters())
    names = [name for name, parameter in parameters.items() if parameter.ndim > 1]
    thetas = [parameters[name].detach() for name in names]
    size = sum(theta.numel() for theta in thetas)
    for _ in range(3):
        for index, (images, labels) in enumerate(Loader()):
            masks = dict(zip(names, largest(thetas, size - round(sparsity * size)), strict=True))
            shown = {name: p.detach() * masks.get(name, 1) for name, p in parameters.items()}
            output = torch.func.functional_call(
                model.net, {k: w.requires_grad_() for k, w in shown.items()}, images.to(dtype)
            )
            nn.functional.cross_entropy(output, labels).backward()
            for name, parameter in parameters.items():
                grad = shown[name].grad
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad
            step_due(optimizers, model.windows, index)
    masks = largest(thetas, size - round(sparsity * size))
    return {name: (theta, mask) for name, theta, mask in zip(names, thetas, masks, strict=True)}
