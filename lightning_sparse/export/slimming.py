"""The same network without the outputs and inputs that are entirely zero."""

import copy
import dataclasses
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._pytree import tree_map_only

from lightning_sparse.export.acceleration import align
from lightning_sparse.export.calls import arguments, copy_model, largest_difference, outputs, rounding
from lightning_sparse.export.channels import Member, Removed, find_groups, follow, provable, reads
from lightning_sparse.export.unknowns import Channels, Unknowns

__all__ = ["Slimming", "SlimLayer", "slim"]


@dataclass(frozen=True)
class SlimLayer:
    """One layer before and after.

    Attributes:
        name: Name of the layer.
        before: Shape of its weight.
        after: Shape of its weight now.
        zeros: Outputs that are left although all their weights are zero, because they are constants that are needed.
    """

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    zeros: int


@dataclass(frozen=True)
class Slimming:
    """What :func:`slim` has removed. Prints as a table.

    Attributes:
        layers: All convolutions and linear layers.
        parameters: How many the model had, and how many it has.
        difference: The largest difference between outputs before and after, in units of the largest output.
    """

    layers: list[SlimLayer]
    parameters: tuple[int, int]
    difference: float

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, strings, lists and dicts."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """The layers that are smaller, in plain text."""
        rows = [["layer", "before", "after", "zero outputs left"]]
        for layer in self.layers:
            if layer.before != layer.after or layer.zeros:
                shapes = ("×".join(map(str, shape)) for shape in (layer.before, layer.after))
                rows.append([layer.name, *shapes, str(layer.zeros)])
        before, after = self.parameters
        return "\n".join([*align(rows), f"{before:,} parameters before, {after:,} after: {after / max(1, before):.1%}"])


def slim(model: nn.Module, example_inputs: Any, *, multiple_of: int = 1) -> nn.Module:
    """Copy a model for inference without its dead channels, so that any engine runs the smaller one at full speed.

    A channel is dead if nothing reads it: its weights in the next layers are all zero, or what it is there is the same
    number for all inputs, and can be added to a bias. That number need not be zero: an output whose weights are zero
    still is its bias, and batch norm makes of it what its mean is far from that. Where zeros are padded, a constant
    differs at the borders, so that one channel is kept, which stands for all constant ones.

    What depends on what is found out in the program that ``torch.export`` writes down, by rules that never call a
    number constant which is none. Which channels go together, in residual and dense connections, depthwise convolutions
    and flattened features, the package torch-pruning finds; its groups are checked against the same program. What the
    rules do not reach, such as the heads of attention, stays as it is. In the end the outputs are compared.

    Args:
        model: The model; it is not changed.
        example_inputs: What it is called with: a tensor, a tuple of arguments or a dict of keyword arguments.
        multiple_of: What the number of channels that are left is to be a multiple of, where channels go: kernels work
            on 8 or 16 at a time, and some have none for other numbers.

    Returns:
        The copy, in evaluation mode; its weights have other shapes. Its attribute ``slimming`` is a :class:`Slimming`:
        print it.

    Raises:
        ModuleNotFoundError: If the package torch-pruning is missing.
        ValueError: If ``torch.export`` cannot write down the model, or if outputs before and after differ beyond
            rounding.

    References:
        Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023, https://arxiv.org/abs/2301.12900

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with torch.no_grad():
        ...     _ = model[0].weight[:5].zero_()
        >>> print(slim(model, torch.randn(1, 4)).slimming)
        layer  before  after  zero outputs left
        0      8×4     3×4    0
        2      2×8     2×3    0
        58 parameters before, 23 after: 39.7%
    """
    if multiple_of < 1:
        raise ValueError(f"Expected argument `multiple_of` to be at least 1, but got {multiple_of}.")
    pruning, (args, kwargs) = _torch_pruning(), arguments(example_inputs)
    slimmed = copy_model(model).eval()
    inputs = [(args, kwargs), tree_map_only(Tensor, _other, (args, kwargs))]
    expected = [outputs(slimmed, *given) for given in inputs]
    program = _program(slimmed, args, kwargs)
    seen = Unknowns(program, slimmed).trace(*args, **kwargs).inputs
    layers = {
        name: layer for name, layer in _layers(slimmed) if len(seen.get(name, ())) == 1 and _is_own(slimmed, layer)
    }
    for name, layer in layers.items():
        _fold(layer, seen[name][0])
    for parameter in slimmed.parameters():
        parameter.requires_grad_(parameter.is_floating_point())  # torch-pruning follows autograd
    graph = follow(pruning, slimmed, args, kwargs)
    groups = list(find_groups(pruning, graph, layers))

    def without(groups: list[list[Member]]) -> nn.Module:
        removed = provable(
            groups, lambda unknown: Unknowns(program, slimmed, unknown).trace(*args, **kwargs), multiple_of
        )
        return _cut(graph, slimmed, removed)

    smaller = without(groups)
    if not _runs(smaller, args, kwargs):  # something has a size of its own, such as a buffer
        smaller = without([group for group in groups if _runs(without([group]), args, kwargs)])
    asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in smaller.named_parameters():
        parameter.requires_grad_(asked.get(name, True))
    smaller.slimming = _compare(model, smaller, inputs, expected)  # type: ignore[assignment]
    return smaller


def _cut(graph: Any, model: nn.Module, removed: Removed) -> nn.Module:
    """A copy without these channels."""
    model = copy.deepcopy(model)
    for (name, side), gone in removed.items():
        layer = model.get_submodule(name)
        pruner = graph.get_pruner_of_module(layer)
        cut = pruner.prune_in_channels if side == "in" else pruner.prune_out_channels
        cut(layer, gone.nonzero().flatten().tolist())
    return model


def _runs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    try:
        return bool(outputs(model, args, kwargs))
    except RuntimeError:
        return False


def _compare(model: nn.Module, slimmed: nn.Module, inputs: Iterable[Any], expected: list[list[Tensor]]) -> Slimming:
    """What has changed, if the outputs have not."""
    found = (outputs(slimmed, *given) for given in inputs)
    difference = max(map(largest_difference, expected, found))
    if not difference <= rounding(model, expected[0]):
        raise ValueError(
            f"Expected equal outputs after slimming, but they differ by {difference:.1e} of the largest. Please report"
            " the model; it cannot be slimmed."
        )
    before = dict(_layers(model))
    rows = [
        SlimLayer(name, tuple(before[name].weight.shape), tuple(layer.weight.shape), int((~_rows(layer)).sum()))
        for name, layer in _layers(slimmed)
    ]
    one, other = (sum(parameter.numel() for parameter in module.parameters()) for module in (model, slimmed))
    return Slimming(rows, (one, other), difference)


# -- what is constant -------------------------------------------------------------------------------------------------


def _program(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    try:
        program: ExportedProgram = torch.export.export(model, args, kwargs).run_decompositions({})
    except Exception as error:  # of which there are many kinds, all of torch's own
        raise ValueError(f"Expected a model that `torch.export` can write down, but got: {error}") from error
    return program


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """All layers that have channels of output and input."""
    for name, layer in model.named_modules():
        if isinstance(layer, _ConvNd | nn.Linear) and isinstance(getattr(layer, "weight", None), nn.Parameter):
            yield name, layer


def _is_own(model: nn.Module, layer: nn.Module) -> bool:
    """Whether no other layer has the same weights, and nothing happens to them on their way."""
    uses = Counter(map(id, (parameter for _, parameter in model.named_parameters(remove_duplicate=False))))
    return all(uses[id(parameter)] == 1 for parameter in layer.parameters())


def _rows(layer: Any) -> Tensor:
    """Which outputs have weights that are not zero."""
    return reads(layer).any(0)


@torch.no_grad()
def _fold(layer: Any, channels: Channels) -> None:
    """Let no weight read what is constant: add it to the bias, or to the weights of one constant channel."""
    if getattr(layer, "groups", 1) > 1:
        return
    transposed = isinstance(layer, _ConvTransposeNd)
    weight = layer.weight if transposed else layer.weight.transpose(0, 1)  # inputs first
    constant = channels.constant.double()
    weight[constant == 0] = 0.0
    found = (~constant.isnan() & weight.ne(0).flatten(1).any(1)).nonzero().flatten()
    if not len(found):
        return
    share = weight[found].double() * constant[found].reshape(-1, *[1] * (weight.ndim - 1))
    if not channels.padded:
        total = share.flatten(2).sum(2).sum(0) if share.ndim > 2 else share.sum(0)
        if layer.bias is None:
            layer.bias = nn.Parameter(total.to(weight.dtype))
        else:
            layer.bias.copy_(layer.bias.double() + total)
        weight[found] = 0.0
    else:
        kept = found[constant[found].abs().argmax()]
        weight[found] = 0.0
        weight[kept] = (share.sum(0) / constant[kept]).to(weight.dtype)


def _other(example: Tensor) -> Tensor:
    """Random numbers in the range of the example; integers stay."""
    if not example.is_floating_point() or not example.numel():
        return example
    generator = torch.Generator().manual_seed(0)
    low, high = example.double().aminmax()
    draw = torch.rand if high > low else torch.randn
    low, high = (low, high) if high > low else (low, low + 1)
    numbers = draw(example.shape, generator=generator, dtype=torch.float64).to(example.device)
    return (low + numbers * (high - low)).to(example.dtype)


def _torch_pruning() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torch_pruning
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Slimming needs a package: pip install 'lightning-sparse[slim]'") from error
    return torch_pruning
