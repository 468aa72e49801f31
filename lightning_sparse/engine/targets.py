"""Which weights are made sparse, and why the others are not."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parameter import UninitializedParameter

from lightning_sparse.engine.checks import check_patterns

__all__ = ["Overrides", "Target", "find_targets", "has_inputs_first", "reshard"]

# Per pattern: settings of the weights that match it, or None to leave them dense.
Overrides = Mapping[str, Mapping[str, float] | None]

# Layers whose weights are treated by default; `Conv1D` of Hugging Face is recognised by name.
_LAYERS = (
    nn.Linear,
    nn.Bilinear,
    nn.modules.conv._ConvNd,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
)
# How these layers name their weights; not what `weight_norm` and the like make of them, such as `weight_g`.
_WEIGHT = re.compile(r"(\w+_)?weight|weight_(ih|hh|hr)(_l\d+)?(_reverse)?")


@dataclass(frozen=True)
class Target:
    """A parameter and the verdict on it.

    Attributes:
        name: Name of the parameter in the module, without the prefix that ``torch.compile`` inserts.
        path: Name by which ``module.get_parameter`` finds it.
        parameter: The parameter itself.
        treated: Whether it is made sparse.
        reason: Kind of layer if treated, else why not, with the names of tied parameters.
        sparsity: Its own budget from ``overrides``, in ``[0, 1)``, or None.
    """

    name: str
    path: str
    parameter: nn.Parameter
    treated: bool
    reason: str
    sparsity: float | None = None


def find_targets(
    module: nn.Module,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    overrides: Overrides | None = None,
) -> list[Target]:
    """Give a verdict on every parameter of a module, tied parameters once.

    A pattern is a glob over names of parameters and of the modules around them (``"layer1.*"``), a regular expression
    searched in the parameter's name (``"re:layer[12]"``), or the class name of a module around it (``"Conv2d"``).

    Args:
        module: Any module.
        targets: Patterns of the weights to treat. By default every weight with at least two dimensions of linear,
            convolution, transposed convolution, attention and recurrent layers and Hugging Face ``Conv1D``. Patterns
            select weights with at least two dimensions; others must be named in full.
        ignore: Patterns of weights to leave dense.
        overrides: Per pattern ``{"sparsity": ...}`` or None (stay dense). A full name beats a module or a glob, which
            beats a class name; then the longer pattern wins.

    Returns:
        One verdict per parameter, in the order of ``module.named_parameters()``.

    Raises:
        TypeError: If patterns are not given as a list of strings.
        ValueError: If a pattern matches no parameter; the message lists near matches. Also if an entry of ``overrides``
            sets the sparsity of weights that stay dense.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        >>> [(t.name, t.reason) for t in find_targets(net, ignore=["2"]) if t.parameter.ndim > 1]
        [('0.weight', 'Linear'), ('2.weight', 'in `ignore`')]
    """
    check_patterns("targets", targets)
    check_patterns("ignore", ignore)
    reshard(module)
    overrides = overrides or {}
    candidates = list(_candidates(module))
    for argument, patterns in (("targets", targets), ("ignore", ignore), ("overrides", overrides)):
        for pattern in patterns or ():
            if not any(candidate.match(pattern) for candidate in candidates):
                raise ValueError(_no_match(argument, pattern, candidates))
    verdicts = [candidate.verdict(targets, ignore or (), overrides) for candidate in candidates]
    for pattern in (pattern for pattern, settings in overrides.items() if settings is not None):
        matching = [v for v, candidate in zip(verdicts, candidates, strict=True) if candidate.match(pattern)]
        if not any(verdict.treated for verdict in matching):
            found = "; ".join(f"{verdict.name}: {verdict.reason}" for verdict in matching[:4])
            raise ValueError(f"Expected `overrides[{pattern!r}]` to match a weight made sparse, but got {found}.")
    return verdicts


def reshard(module: nn.Module) -> None:
    """Drop the gathered copies of parameters that FSDP2 keeps after a forward without backward."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def has_inputs_first(layer: nn.Module) -> bool:
    """Whether dimension 0 of a layer's weight counts inputs: of transposed convolutions and Hugging Face `Conv1D`."""
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    return transposed or any(cls.__name__ == "Conv1D" for cls in type(layer).__mro__)


@dataclass
class _Candidate:
    """A parameter under every name it has, each with the modules around it, outermost first."""

    parameter: nn.Parameter
    names: list[str]
    paths: list[str]
    ancestors: list[list[tuple[str, nn.Module]]]

    def match(self, pattern: str) -> int:
        """Rank of the match: 3 by full name, 2 by name, module or expression, 1 by class, 0 not at all."""
        if pattern in self.names:
            return 3
        if pattern.startswith("re:"):
            return 2 * any(re.search(pattern[3:], name) is not None for name in self.names)
        around = [ancestor for chain in self.ancestors for ancestor in chain]
        if any(fnmatchcase(name, pattern) for name in [*self.names, *(path for path, _ in around if path)]):
            return 2
        return int(any(cls.__name__ == pattern for _, layer in around for cls in type(layer).__mro__))

    def verdict(self, targets: Sequence[str] | None, ignore: Sequence[str], overrides: Overrides) -> Target:
        """Decide whether the parameter is treated."""
        matching = [pattern for pattern in overrides if self.match(pattern)]
        best = max(matching, key=lambda pattern: (self.match(pattern), len(pattern)), default=None)
        override: Mapping[str, Any] | None = {} if best is None else overrides[best]
        refusal = self._refusal(targets, ignore)
        if refusal is None and override is None:
            refusal = f"dense by `overrides[{best!r}]`"
        sparsity = (override or {}).get("sparsity")
        own = "" if sparsity is None else f", own sparsity {sparsity:g}"
        return Target(
            self.names[0],
            self.paths[0],
            self.parameter,
            treated=refusal is None,
            reason=refusal or type(self.ancestors[0][-1][1]).__name__ + self._ties() + own,
            sparsity=sparsity,
        )

    def _refusal(self, targets: Sequence[str] | None, ignore: Sequence[str]) -> str | None:
        if isinstance(self.parameter, UninitializedParameter):
            return "not initialised"
        rank = max((self.match(pattern) for pattern in targets or ()), default=0)
        if targets is not None and not rank:
            return "not in `targets`"
        if self.parameter.ndim < 2 and rank < 3:
            return "fewer than 2 dimensions"
        if targets is None:
            for chain, name in zip(self.ancestors, self.names, strict=True):
                layer, leaf = chain[-1][1], name.rpartition(".")[2]
                if not isinstance(layer, _LAYERS) and type(layer).__name__ != "Conv1D":
                    return f"{type(layer).__name__} stays dense by default{self._ties()}"
                if not _WEIGHT.fullmatch(leaf):
                    return f"{leaf} stays dense by default{self._ties()}"
        if any(self.match(pattern) for pattern in ignore):
            return "in `ignore`"
        if not self.parameter.is_floating_point():
            return "not floating point"
        return None if self.parameter.requires_grad else "frozen"

    def _ties(self) -> str:
        return f" (tied to {', '.join(self.names[1:])})" if len(self.names) > 1 else ""


def _candidates(module: nn.Module) -> Iterator[_Candidate]:
    modules = dict(module.named_modules(remove_duplicate=False))
    found: dict[int, _Candidate] = {}
    for path, parameter in module.named_parameters(remove_duplicate=False):
        parts = path.split(".")[:-1]
        chain = [(_plain(".".join(parts[:depth])), modules[".".join(parts[:depth])]) for depth in range(len(parts) + 1)]
        candidate = found.setdefault(id(parameter), _Candidate(parameter, [], [], []))
        candidate.names.append(_plain(path))
        candidate.paths.append(path)
        candidate.ancestors.append(chain)
    yield from found.values()


def _plain(path: str) -> str:
    """Drop what ``torch.compile`` inserts into names."""
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


def _no_match(argument: str, pattern: str, candidates: list[_Candidate]) -> str:
    around = [ancestor for candidate in candidates for chain in candidate.ancestors for ancestor in chain]
    known = {name for candidate in candidates for name in candidate.names}
    known |= {path for path, _ in around if path} | {type(layer).__name__ for _, layer in around}
    close = difflib.get_close_matches(pattern, sorted(known), n=3, cutoff=0.5)
    hint = (
        f"Did you mean {' or '.join(map(repr, close))}?"
        if close
        else f"Known names are, among others, {sorted(known)[:6]}."
    )
    return f"Expected each pattern in `{argument}` to match a parameter, but {pattern!r} matches none. {hint}"
