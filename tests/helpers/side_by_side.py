"""Train a small network twice: by Lightning with a callback, and by a plain loop from the equations."""

import copy
import math

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers import conformance
from tests.helpers.assertions import grows
from tests.helpers.models import make_trainer
from tests.reference.training import train

EPOCHS, BATCHES = 12, 10
# After 120 steps in double precision nothing but rounding may differ; any other equation shows far above it.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-6}
WEIGHTS = ["stem.weight", "depthwise.weight", "grouped.weight", "head.weight"]


class Net(L.LightningModule):
    """Ordinary, depthwise and grouped convolutions with and without bias, batch normalisation, a linear head.

    The activations are smooth: a rounding error that moves an input of a relu across zero would change the gradient.
    """

    def __init__(self, configure, dtype=torch.float64, interval="step"):
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1, bias=False, dtype=dtype)
        self.norm = nn.BatchNorm2d(8, dtype=dtype)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, dtype=dtype)
        self.grouped = nn.Conv2d(8, 12, 1, groups=2, dtype=dtype)
        self.head = nn.Linear(12 * 4, 5, dtype=dtype)
        self.configure, self.interval = configure, interval

    def forward(self, x):
        x = F.silu(self.norm(self.stem(x)))
        x = F.silu(self.grouped(F.silu(self.depthwise(x))))
        return self.head(F.avg_pool2d(x, 3).flatten(1))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer, scheduler = self.configure(dict(self.named_parameters()))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.interval}}


def waves(optimizer):
    """A schedule that changes the rate at every step."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.6 + 0.4 * math.cos(step / 7))


def host(optimizer, lr, schedule=waves, **settings):
    """A function that makes the optimizer, in three groups, and its schedule."""

    def configure(thetas):
        groups = [
            {"params": [p for name, p in thetas.items() if p.ndim > 1 and name != "head.weight"]},
            {"params": [p for p in thetas.values() if p.ndim == 1], "weight_decay": 0.0},
            {"params": [thetas["head.weight"]], "lr": lr / 2},
        ]
        stepped = optimizer(groups, lr=lr, **settings)
        return stepped, schedule(stepped)

    return configure


HOSTS = {
    "sgd": host(torch.optim.SGD, 0.02, momentum=0.9, weight_decay=5e-3),
    "nesterov": host(torch.optim.SGD, 0.02, momentum=0.8, nesterov=True, weight_decay=5e-3),
    "adamw": host(torch.optim.AdamW, 3e-3, weight_decay=5e-2),
}
# Every optimizer in double precision, one in single precision.
hosts_and_dtypes = pytest.mark.parametrize(
    ("host", "dtype"), [*((name, torch.float64) for name in HOSTS), ("adamw", torch.float32)]
)
STANDING_STILL = host(torch.optim.SGD, 0.0)


def make_data(dtype=torch.float64):
    data = [(torch.randn(16, 2, 6, 6, dtype=dtype), torch.randint(0, 5, (16,))) for _ in range(BATCHES)]
    return torch.utils.data.DataLoader(data, batch_size=None)


def differences(
    callback,
    reference,
    *,
    host="sgd",
    dtype=torch.float64,
    epochs=EPOCHS,
    accumulate=1,
    clip=None,
    interval="step",
    **flags,
):
    """Train both ways and return the largest difference of each kind of tensor, and how many entries are off."""
    configure = HOSTS.get(host, host)
    net, data = Net(configure, dtype, interval), make_data(dtype)
    twin = copy.deepcopy(net)
    method = reference(dict(twin.named_parameters()))
    trainer = make_trainer(
        callback, max_epochs=epochs, accumulate_grad_batches=accumulate, gradient_clip_val=clip, **flags
    )
    trainer.fit(net, data)
    settings = {"epochs": epochs, "accumulate": accumulate, "clip": clip, "interval": interval}
    train(twin, method, list(data), configure=configure, **settings)

    names = method.names
    assert sorted(callback.targets) == sorted(names)
    ours, expected = net.state_dict(), twin.state_dict() | {name: method.weight(name) for name in names}
    thresholds = [(callback.threshold(name), method.threshold(name)) for name in names]
    found = {
        "latents": max(distance(callback.latent(name), method.latent(name)) for name in names),
        "weights": max(distance(ours[name], expected[name]) for name in names),
        "all else": max(distance(ours[name], expected[name]) for name in ours if name not in names),
        "thresholds": max(0.0 if a == b else abs(a - b) for a, b in thresholds),  # None equals None
        "wrong in masks": sum(int((callback.mask(name) != method.mask(name)).sum()) for name in names),
        "zeros not as masked": sum(wrong_zeros(callback, name, ours[name]) for name in names),
    }
    steps = epochs * math.ceil(BATCHES / accumulate)
    conformance.record(callback, trainer.optimizers[0], dtype, steps, found)
    return found


def wrong_zeros(callback, name, weight):
    mask = callback.mask(name)
    # A weight that is new, from zero, stays so where no gradient arrives.
    return int((weight[~mask] != 0).sum()) + (0 if grows(callback) else int((weight[mask] == 0).sum()))


def distance(a, b):
    return float((a.double() - b.double()).abs().max())


def assert_equal_training(callback, reference, *, dtype=torch.float64, **settings):
    """Both ways of training end in the same latents, thresholds, masks and weights, and have pruned something.

    Args:
        callback: Trains the network in Lightning.
        reference: Makes the method of `tests.reference.training` from the parameters of the twin.
        settings: See `differences`.
    """
    found = differences(callback, reference, dtype=dtype, **settings)
    assert found.pop("wrong in masks") == found.pop("zeros not as masked") == 0
    assert max(found.values()) <= TOLERANCE[dtype], found
    assert 0.1 < callback.sparsity < 0.95
