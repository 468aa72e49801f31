"""What every test of a law compares."""

from collections.abc import Mapping, Sized
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_sparse import ACDC, MEST, SSTE, GraNet, SparseTraining, Spartan
from lightning_sparse.functional import channel_scale, group_soft_threshold, soft_threshold
from lightning_sparse.functional.sharding import is_sharded, whole
from lightning_sparse.strategies.sparse_to_sparse import SparseToSparse


def assert_same(actual: Any, expected: Any, where: str = "") -> None:
    """Compare nested containers of tensors bit for bit."""
    if isinstance(expected, Tensor):
        assert actual.dtype == expected.dtype, where
        assert torch.equal(actual, expected), f"{where}: {(actual != expected).sum()} of {actual.numel()} differ"
    elif isinstance(expected, Mapping):
        assert actual.keys() == expected.keys(), where
        for key in expected:
            assert_same(actual[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), where
        for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
            assert_same(one, other, f"{where}/{i}")
    else:
        assert actual == expected, where


def assert_different(actual: nn.Module, expected: nn.Module) -> None:
    pairs = zip(actual.parameters(), expected.parameters(), strict=True)
    assert not all(torch.equal(one, other) for one, other in pairs)


def assert_sparse(model: LightningModule, callback: SparseTraining) -> None:
    """The model holds the projection of the latents, with zeros exactly where the callback says so."""
    for name in callback.targets:
        parameter = model.get_parameter(name).detach()
        weight, mask = whole(parameter), whole(callback.mask(name))
        zeros = weight == 0 if not grows(callback) else (weight == 0) & ~mask  # new weights start from zero
        assert torch.equal(zeros, ~mask), f"{name}: zeros {(weight == 0).sum()}, pruned {(~mask).sum()}"
        if is_sharded(parameter):  # the sum over a row that is split is rounded otherwise
            torch.testing.assert_close(weight, project(callback, name), rtol=1e-6, atol=0.0)
        else:
            assert torch.equal(weight, project(callback, name)), f"{name} is no projection"


def grows(callback: SparseTraining) -> bool:
    """Whether weights come back from zero."""
    return isinstance(callback, ACDC | GraNet | MEST | SparseToSparse)


def pruned(callback: SparseTraining) -> float:
    """Fraction of the weights that are off the masks; some on them may be zero, too, if they are new."""
    masks = [whole(callback.mask(name)) for name in callback.targets]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def project(callback: SparseTraining, name: str) -> Tensor:
    """What the network sees of a weight, from what the callback tells about it."""
    theta, threshold = whole(callback.latent(name)), callback.threshold(name)
    if isinstance(callback, SSTE):
        return group_soft_threshold(theta, callback.pattern) * callback._find(name).state["scale"]
    if threshold is None:
        weight = torch.where(whole(callback.mask(name)), theta, 0.0)
        if isinstance(callback, Spartan) and "mask" in (state := callback._find(name).state):
            weight = weight * whole(state["soft"])
        return weight.sign() * weight.abs() ** getattr(callback, "power", 1.0)
    if callback.pattern is not None:
        weight = group_soft_threshold(theta, callback.pattern, callback._find(name).state["threshold"])
        return weight * channel_scale(theta, weight != 0) if getattr(callback, "rescale", False) else weight
    weight = soft_threshold(theta, threshold)
    return weight * channel_scale(theta, threshold) if getattr(callback, "rescale", False) else weight


def count_sparsity(model: nn.Module, names: list[str] | None = None) -> float:
    tensors = [parameter for name, parameter in model.named_parameters() if names is None or name in names]
    return sum(int((t == 0).sum()) for t in tensors) / sum(t.numel() for t in tensors)


def describe(module: nn.Module) -> list[Any]:
    """All that is attached to a module and its children except for values: names, classes, hooks, shapes, strides."""
    return [
        (name, type(m), {k: len(v) if isinstance(v, Sized) else None for k, v in vars(m).items()})
        for name, m in module.named_modules()
    ] + [(name, type(p), p.shape, p.stride(), id(p), p.data_ptr()) for name, p in module.named_parameters()]
