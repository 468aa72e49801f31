"""How a model is called, copied and compared with what was made of it."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["arguments", "copy_model", "largest_difference", "outputs", "rounding"]


def arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model is called with.

    Args:
        example_inputs: A tensor, a tuple of arguments or a dict of keyword arguments.

    Returns:
        Arguments and keyword arguments.
    """
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)), {}


def copy_model(model: nn.Module) -> nn.Module:
    """A copy without the Trainer that a LightningModule holds."""
    held = (getattr(module, "_trainer", None) for module in model.modules())
    return copy.deepcopy(model, {id(trainer): None for trainer in held if trainer is not None})


@torch.no_grad()
def outputs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that a model returns, in order.

    Raises:
        ValueError: If there are none.
    """
    args, kwargs = tree_map_only(Tensor, Tensor.clone, (args, dict(kwargs)))  # a model may write into its inputs
    found = [leaf for leaf in tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]
    if not found:
        raise ValueError("Expected a model that returns tensors, alone or in tuples, lists and dicts, but got none.")
    return found


def largest_difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """How far outputs differ, in units of the largest number in each.

    Args:
        expected: Tensors.
        found: As many, on any devices.

    Returns:
        The largest difference of all; infinite where shapes differ, or where only one of them is a finite number.

    Example:
        >>> largest_difference([torch.tensor([4.0, 0.0])], [torch.tensor([4.0, 1.0])])
        0.25
    """
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in found]:
        return float("inf")
    largest = 0.0
    for one, other in zip(expected, found, strict=True):
        a, b = one.detach().double(), other.detach().to(one.device, torch.float64)
        difference = (a - b).abs().masked_fill((a == b) | (a.isnan() & b.isnan()), 0.0).nan_to_num(nan=torch.inf)
        if float(difference.sum()):
            scale = a.nan_to_num(0.0, 0.0, 0.0).abs().max()
            largest = max(largest, float(difference.max() / scale))
    return largest


def rounding(model: nn.Module, results: list[Tensor]) -> float:
    """By how much outputs may differ that are the same numbers, added in another order.

    Returns:
        128 units in the last place of the coarsest type of number, at most 0.05.
    """
    dtypes = {tensor.dtype for tensor in (*model.parameters(), *results) if tensor.is_floating_point()}
    return min(0.05, 128 * max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0))
