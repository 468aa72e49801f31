"""Channels that go together, through all layers, and which of them nothing reads."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._pytree import tree_leaves

from lightning_sparse.export.unknowns import Unknowns

__all__ = ["Member", "Removed", "find_groups", "follow", "provable", "reads"]


def reads(layer: Any) -> Tensor:
    """Which output of a convolution or a linear layer reads which input.

    Returns:
        Shape ``(inputs, outputs)``, bool; inputs are those of one group.
    """
    read = layer.weight.detach().cpu().ne(0)
    read = read.flatten(2).any(2) if read.ndim > 2 else read
    return read if isinstance(layer, _ConvTransposeNd) else read.T  # type: ignore[no-any-return]


class Member(NamedTuple):
    """Channels of a layer that go together with those of the root of the group."""

    name: str
    side: str  # "in", "out", or "both" in a layer that treats each channel alone
    layer: Any
    indices: Tensor
    roots: Tensor


Removed: TypeAlias = dict[tuple[str, str], Tensor]  # bool, which channels of a side of a layer go


def follow(pruning: Any, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The dependency graph of torch-pruning, which follows autograd."""
    graph = pruning.DependencyGraph()
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            graph.build_dependency(model, (), lambda *_: model(*args, **kwargs), _differentiable, verbose=False)
        except Exception as error:
            raise ValueError(f"Expected a model that torch-pruning can follow, but got: {error}") from error
    return graph


def _differentiable(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]


def find_groups(pruning: Any, graph: Any, layers: Mapping[str, Any]) -> Iterator[list[Member]]:
    """Channels that go together; a group that holds what is not understood is left out."""
    names = {layer: name for name, layer in layers.items()}
    names |= {layer: name for name, layer in graph.model.named_modules() if isinstance(layer, _BatchNorm | nn.PReLU)}
    covered: dict[str, set[int]] = {}
    for name, layer in layers.items():
        if layer not in graph.module2node or getattr(layer, "groups", 1) > 1:
            continue
        cut = graph.get_pruner_of_module(layer).prune_out_channels
        if len(covered.get(name, ())) == graph.get_out_channels(layer):
            continue  # it is in a group already
        group = graph.get_pruning_group(layer, cut, range(graph.get_out_channels(layer)))
        members = [_member(pruning, graph, names, item) for item in group]
        for member in members:
            if member is not None and member.side == "out":
                covered.setdefault(member.name, set()).update(member.indices.tolist())
        if None not in members:
            yield [member for member in members if member is not None and member.side]


def _member(pruning: Any, graph: Any, names: Mapping[nn.Module, str], item: Any) -> Member | None:
    """What torch-pruning says of one layer; None if it is not understood."""
    kinds, (dependency, indices) = pruning.ops.OPTYPE, item
    layer, kind = dependency.target.module, dependency.target.type
    if kind in (kinds.CONCAT, kinds.SPLIT, kinds.ELEMENTWISE, kinds.RESHAPE, kinds.UNBIND, kinds.EXPAND, kinds.SLICE):
        return Member("", "", None, torch.empty(0), torch.empty(0))
    if layer not in names or None in item.root_idxs:
        return None
    groups, side = getattr(layer, "groups", 1), "both"
    if isinstance(layer, nn.PReLU) and layer.num_parameters == 1:
        return Member("", "", None, torch.empty(0), torch.empty(0))
    if groups > 1 and not groups == layer.in_channels == layer.out_channels:
        return None
    if groups == 1 and isinstance(layer, _ConvNd | nn.Linear):
        side = "in" if graph.is_in_channel_pruning_fn(dependency.handler) else "out"
    member = Member(names[layer], side, layer, torch.tensor(indices), torch.tensor(item.root_idxs))
    return member if member.indices.max() < _size(member) else None


def _unread(groups: list[list[Member]], multiple_of: int) -> Removed:
    """Channels that nothing reads. One is left of each layer, and as many more as make a multiple."""
    spared = [torch.zeros(_count(group), dtype=torch.bool) for group in groups]
    removed, dead = _settle(groups, spared)
    for group, gone, keep in zip(groups, dead, spared, strict=True):
        missing = -int((~gone).sum()) % multiple_of
        rows = torch.zeros(_count(group), dtype=torch.bool)  # those that read something are spared last
        for member in group:
            if member.side == "out":
                rows[member.roots[reads(member.layer).any(0)[member.indices]]] = True
        order = torch.cat([(gone & ~rows).nonzero(), (gone & rows).nonzero()]).flatten()
        keep[order[:missing]] = True
    return removed if multiple_of == 1 else _settle(groups, spared)[0]


def _settle(groups: list[list[Member]], spared: list[Tensor]) -> tuple[Removed, list[Tensor]]:
    """What can go, and which channels of each group that are, until nothing more can."""
    members = [member for group in groups for member in group]
    readers = {member.name: reads(member.layer).float() for member in members if member.side == "in"}
    sizes = {(member.name, member.side): _size(member) for member in members}
    removed = {key: torch.zeros(size, dtype=torch.bool) for key, size in sizes.items()}
    dead = [torch.zeros_like(keep) for keep in spared]
    changed = True
    while changed:
        changed = False
        for number, group in enumerate(groups):
            now = _dead_roots(group, readers, removed) & ~spared[number]
            for member in group:
                gone = removed[member.name, member.side]
                new = member.indices[now[member.roots] & ~gone[member.indices]]
                if len(new) and int(gone.sum()) + len(new) == len(gone):
                    spared[number][member.roots[member.indices == new[0]]] = True
                    now &= ~spared[number]
            for member in group:
                removed[member.name, member.side][member.indices[now[member.roots]]] = True
            changed |= not torch.equal(now, dead[number])
            dead[number] = now
    return {key: gone for key, gone in removed.items() if gone.any()}, dead


def _count(group: list[Member]) -> int:
    return 1 + max(int(member.roots.max()) for member in group)


def _dead_roots(group: list[Member], readers: Mapping[str, Tensor], removed: Removed) -> Tensor:
    """Of a group, the channels that some layer could read and none does."""
    count = _count(group)
    known, read = torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.bool)
    for member in group:
        if member.side == "in":
            reader, gone = readers[member.name], removed.get((member.name, "out"))
            alive = torch.ones(reader.shape[1]) if gone is None else (~gone).float()
            known[member.roots] = True
            read[member.roots[(reader @ alive > 0)[member.indices]]] = True
    return known & ~read


def _size(member: Member) -> int:
    if member.side in ("in", "out"):
        return int(reads(member.layer).shape[member.side == "out"])
    layer = member.layer
    return int(layer.num_features if isinstance(layer, _BatchNorm) else len(layer.weight))


def provable(
    groups: list[list[Member]], trace: Callable[[Mapping[str, Tensor]], Unknowns], multiple_of: int = 1
) -> Removed:
    """What can go: that of all groups, or if there is no proof, of those for which there is one alone."""
    removed = _unread(groups, multiple_of)
    if not removed or _is_proven(removed, trace):
        return removed
    kept = [group for group in groups if _is_proven(_unread([group], multiple_of), trace)]
    removed = _unread(kept, multiple_of)
    return removed if _is_proven(removed, trace) else {}


def _is_proven(removed: Removed, trace: Callable[[Mapping[str, Tensor]], Unknowns]) -> bool:
    """Whether no output depends on these channels, and they are the same ones wherever they arrive."""
    run = trace({name: gone.nonzero().flatten() for (name, side), gone in removed.items() if side != "in"})
    expected = {name: gone for (name, side), gone in removed.items() if side != "out"}
    if run.leaks or not expected.keys() <= run.inputs.keys():
        return False
    for name, uses in run.inputs.items():
        for use in uses:
            gone = expected.get(name, torch.zeros(len(use.all), dtype=torch.bool)).to(use.all.device)
            if not torch.equal(use.all, gone) or not torch.equal(use.some, gone):
                return False
    return True
