"""What people do today without this package, each as short as it can be, with the costs of the code it stands for.

Each baseline changes a network in place and returns the Lightning callbacks that belong to it. All of them put a
`torch.nn.utils.parametrize` module (or a pruning hook) before every weight: autograd goes through it, and the keys of
the `state_dict` change.
"""

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelPruning
from torch import nn
from torch.nn.utils import parametrize

SPARSITY = 0.9


class EveryBatch(L.Callback):
    """Calls a function before the first batch and after every batch."""

    def __init__(self, function):
        self.function = torch.no_grad()(function)

    def on_train_start(self, *_):
        self.function()

    def on_train_batch_end(self, *_):
        self.function()


def wrap(network, rule):
    """Put `rule(theta)` before every weight of the network; return the pairs of rule and dense weight."""
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    rules = [rule(layer.weight) for layer in layers]
    for layer, made in zip(layers, rules, strict=True):
        parametrize.register_parametrization(layer, "weight", made)
    return [(made, layer.parametrizations.weight.original) for made, layer in zip(rules, layers, strict=True)]


class StraightThrough(nn.Module):
    """ST-3 in the forward pass, the identity for autograd."""

    def __init__(self, theta):
        super().__init__()
        self.register_buffer("mask", torch.ones_like(theta))
        self.register_buffer("scale", theta.new_ones(len(theta), *[1] * (theta.ndim - 1)))
        self.threshold = 0.0

    def forward(self, theta):
        with torch.no_grad():
            delta = self.scale * ((theta - theta.sign() * self.threshold) * self.mask) - theta
        return theta + delta

    def choose(self, theta, threshold):
        dims, magnitude = tuple(range(1, theta.ndim)), theta.abs()
        self.threshold = threshold
        self.mask.copy_(magnitude > threshold)
        kept, dense = (magnitude * self.mask).mean(dims, keepdim=True), magnitude.mean(dims, keepdim=True)
        self.scale.copy_(1.01 / ((kept + 1e-6) / (dense + 1e-6) + 0.01))


def full_sort(network):
    """ST-3 as its authors' code does it: sort all magnitudes after every batch."""
    pairs = wrap(network, StraightThrough)

    def choose():
        magnitudes = torch.cat([theta.flatten() for _, theta in pairs]).abs_().sort().values
        below, share = divmod(SPARSITY * (len(magnitudes) - 1), 1)
        threshold = torch.lerp(magnitudes[int(below)], magnitudes[int(below) + 1], share).item()
        for rule, theta in pairs:
            rule.choose(theta, threshold)

    return [EveryBatch(choose)]


class LearnedThreshold(nn.Module):
    """The layers of STR: autograd differentiates the soft threshold."""

    def __init__(self, theta):
        super().__init__()
        self.s = nn.Parameter(theta.new_tensor(-5.0))

    def forward(self, theta):
        return theta.sign() * torch.relu(theta.abs() - self.s.sigmoid())


def autograd(network):
    """STR as its authors' code does it."""
    wrap(network, LearnedThreshold)
    return []


class Mask(nn.Module):
    """The usual parametrization for a mask."""

    def __init__(self, theta):
        super().__init__()
        self.register_buffer("mask", torch.ones_like(theta))

    def forward(self, theta):
        return theta * self.mask

    def choose(self, theta):
        magnitude = theta.abs()
        self.mask.copy_(magnitude > magnitude.flatten().kthvalue(max(1, int(SPARSITY * theta.numel()))).values)


def masks(network):
    """The largest weights of each layer, chosen anew after every batch."""
    pairs = wrap(network, Mask)

    def choose():
        for rule, theta in pairs:
            rule.choose(theta)

    return [EveryBatch(choose)]


class PruningEveryBatch(ModelPruning):
    """Lightning's own callback, told to prune after every batch: 90 % at first, then one weight more each time.

    It prunes what is left and never chooses anew, so that 90 % each time would soon leave nothing.
    """

    def __init__(self, layers):
        super().__init__(
            "l1_unstructured",
            parameters_to_prune=[(layer, "weight") for layer in layers],
            amount=lambda _: 1 if hasattr(layers[0], "weight_mask") else SPARSITY,
            use_lottery_ticket_hypothesis=False,
        )

    def on_train_batch_end(self, trainer, *_):
        self._run_pruning(trainer.current_epoch)


def model_pruning(network):
    """`lightning.pytorch.callbacks.ModelPruning`."""
    return [PruningEveryBatch([module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)])]


BASELINES = {"full-sort": full_sort, "autograd": autograd, "parametrize": masks, "ModelPruning": model_pruning}
