"""Count the multiply-accumulates of a forward pass, weight by weight, and price them by the weights' densities.

One multiply-accumulate is one FLOP. Convolutions and matrix multiplications are counted; whatever else runs is named
in ``FlopCount.uncounted``. The numbers are theoretical: they say nothing about the speed of a device.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from types import TracebackType
from typing import Any, Self

import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from lightning_sparse._flop_handles import WORK, Value, Work
from lightning_sparse._untouched import untouched
from lightning_sparse.functional import count_nonzeros

__all__ = ["FlopCount", "FlopRecorder", "count_flops", "readable"]

_log = logging.getLogger(__name__)

_REST = ""  # counts without a weight; no parameter has an empty name

# What stands between a stored weight and its use without changing which of its entries are zero.
_VIEW_NAMES = (
    "adjoint alias chunk clone contiguous detach dropout expand expand_as flatten mH mT matrix_H movedim narrow "
    "numpy_T permute reshape reshape_as select slice split split_with_sizes squeeze swapaxes swapdims t tensor_split "
    "to transpose type_as unbind unflatten unsafe_chunk unsafe_split unsqueeze view view_as"
)
_VIEWS = frozenset(f"aten::{name}" for name in _VIEW_NAMES.split()) | {"prim::ListUnpack"}


@dataclass(frozen=True)
class FlopCount:
    """Multiply-accumulates of one forward pass, split by the weight that is multiplied.

    Args:
        by_layer: Full parameter name to the dense count due to that weight, over all of its uses.
        rest: Count of the products without a stored weight, such as attention scores.
        densities: Full parameter name to the fraction of nonzero entries when the count was made.
        uncounted: What ran without being counted, to its number of occurrences.
        aliases: Further names of tied weights to the name under which they are counted.

    Example:
        >>> count = FlopCount(by_layer={"a": 100, "b": 300}, rest=50, densities={"a": Fraction(1, 2), "b": Fraction(1)})
        >>> count.dense, count.sparse
        (450, 400.0)
        >>> count.inference({"a": 0.25})
        375.0
    """

    by_layer: dict[str, int]
    rest: int = 0
    densities: dict[str, Fraction] = field(default_factory=dict)
    uncounted: dict[str, int] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)

    @property
    def dense(self) -> int:
        """Count with every weight taken as full."""
        return sum(self.by_layer.values()) + self.rest

    @property
    def by_layer_sparse(self) -> dict[str, Fraction]:
        """Exact product of density and dense count of every weight."""
        return {name: self.densities.get(name, Fraction(1)) * macs for name, macs in self.by_layer.items()}

    @property
    def sparse(self) -> float:
        """Count with the zeros of the weights skipped: the exact sum, rounded once to a float."""
        return self.inference(self.densities)

    def inference(self, densities: Mapping[str, float | Fraction]) -> float:
        r"""Price a forward pass at the given densities.

        .. math:: \sum_l a_l F_l + \text{rest}

        Args:
            densities: Parameter name to density :math:`a_l` in ``[0, 1]``; weights without an entry are dense.

        Returns:
            The count; exact, but for one rounding, if the densities are fractions.
        """
        a = self._resolve(densities)
        return float(sum(a.get(name, 1) * macs for name, macs in self.by_layer.items()) + self.rest)

    def training(
        self,
        densities: Mapping[str, float | Fraction],
        gradient_densities: Mapping[str, float | Fraction],
    ) -> float:
        r"""Price a training step: forward pass, gradient of the activations, gradient of the weights.

        .. math:: \sum_l (2 a_l + b_l) F_l + 3 \cdot \text{rest}

        Args:
            densities: Parameter name to density :math:`a_l` in ``[0, 1]``; weights without an entry are dense.
            gradient_densities: Parameter name to the fraction :math:`b_l` of the weight gradient that is computed;
                weights without an entry need all of it.

        Returns:
            The count; exact, but for one rounding, if the densities are fractions.

        Example:
            >>> FlopCount(by_layer={"a": 100}, rest=10).training({"a": 0.5}, {})
            230.0
        """
        a, b = self._resolve(densities), self._resolve(gradient_densities)
        weights = sum((2 * a.get(name, 1) + b.get(name, 1)) * macs for name, macs in self.by_layer.items())
        return float(weights + 3 * self.rest)

    def _resolve(self, densities: Mapping[str, float | Fraction]) -> dict[str, float | Fraction]:
        """Turn further names of tied weights into the counted one."""
        return {self.aliases.get(name, name): density for name, density in densities.items()}

    def __str__(self) -> str:
        """Show one line per weight, the totals and what was not counted."""
        rows: list[tuple[str, int, float]] = [
            *((name, self.by_layer[name], float(macs)) for name, macs in self.by_layer_sparse.items()),
            ("(without weight)", self.rest, float(self.rest)),
            ("total", self.dense, self.sparse),
        ]
        width = max(len(name) for name, _, _ in rows)
        lines = [f"{'weight':<{width}}     dense    sparse  density"]
        for name, dense, sparse in rows:
            share = f"{sparse / dense:.2%}" if dense else "-"
            lines.append(f"{name:<{width}}  {readable(dense):>8}  {readable(sparse):>8}  {share:>7}")
        uncounted = ", ".join(f"{name} ({times})" for name, times in sorted(self.uncounted.items()))
        return "\n".join([*lines, "1 multiply-accumulate = 1 FLOP", f"not counted: {uncounted or 'nothing'}"])


def count_flops(module: nn.Module, /, *inputs: Any, **kwargs: Any) -> FlopCount:
    """Count the multiply-accumulates of ``module(*inputs, **kwargs)`` and attribute them to the weights.

    The forward pass runs once in evaluation mode and leaves the module, the inputs and the random state as they were.
    A module that cannot be traced is counted submodule by submodule, and ``uncounted`` says so. Work on which no tensor
    in the output depends is left out.

    Args:
        module: Any module; its parameters may be tied, functional or on any device.
        *inputs: What the module is called with: tensors, nested containers of tensors, constants.
        **kwargs: Keyword arguments of the call.

    Returns:
        The count for exactly these inputs, that is for the whole batch.

    Example:
        >>> layer = nn.Linear(4, 3)
        >>> layer.weight.data[0] = 0.0
        >>> count = count_flops(layer, torch.randn(2, 4))
        >>> count.by_layer, count.dense, count.sparse
        ({'weight': 24}, 24, 16.0)
    """
    recorder = FlopRecorder(module)
    if not recorder.trace(module, inputs, kwargs):
        call = _Flat(module, inputs, kwargs)
        with untouched(module), recorder:
            call.run(*call.tensors)
    return recorder.count()


class FlopRecorder:
    """Count the forward passes of a module that run inside a ``with`` block, however they are called.

    Every outermost call of the module or a submodule is traced once more on its own inputs. Use this where the inputs
    are known only while the program runs, as in a training step. Compiled code runs uncompiled inside the block.

    Args:
        module: The module that owns the weights.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        >>> with FlopRecorder(net) as recorder:
        ...     _ = net[1](net[0](torch.randn(1, 4)))
        >>> recorder.count().by_layer
        {'0.weight': 12, '1.weight': 6}
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._macs: Counter[str] = Counter()
        self._uncounted: Counter[str] = Counter()
        self._exit = ExitStack()
        self._inside: nn.Module | None = None
        self._failed: set[nn.Module] = set()

    def __enter__(self) -> Self:
        # Compiled code would be recompiled around the hooks.
        self._exit.enter_context(torch.compiler.set_stance("force_eager"))
        for name, submodule in self.module.named_modules():
            if isinstance(submodule, torch.jit.ScriptModule):
                self._uncounted[f"TorchScript module `{name}`"] += 1  # it takes no hooks
                continue
            # First of all hooks: the trace runs the others itself, on the inputs as the caller gave them. Only that of
            # FSDP2, which gathers the weights, cannot be traced and has to be behind us.
            first = not isinstance(submodule, FSDPModule)
            before = submodule.register_forward_pre_hook(self._before, prepend=first, with_kwargs=True)
            after = submodule.register_forward_hook(self._after, always_call=True)
            self._exit.callback(before.remove)
            self._exit.callback(after.remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._exit.close()
        self._inside = None

    def trace(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Count one call of ``module``, which is the recorder's module or one inside it.

        Args:
            module: The module to call.
            args: Positional arguments of the call.
            kwargs: Keyword arguments of the call.

        Returns:
            Whether the call could be traced. If not, it is named among the uncounted.
        """
        names = {id(parameter): name for name, parameter in self._named_parameters()}
        try:
            with untouched(module):
                macs, uncounted = _trace(_Flat(module, args, kwargs), [names[id(p)] for p in module.parameters()])
        except Exception as error:
            _log.debug("Tracing %s failed.", type(module).__name__, exc_info=True)
            label = self._label(module)
            self._uncounted[f"all but the layers inside {label}, tracing raised {type(error).__name__}"] += 1
            self._failed.add(module)
            return False
        self._macs += macs
        self._uncounted += uncounted
        return True

    def count(self) -> FlopCount:
        """Return what was counted so far, priced by the weights as they are now."""
        parameters = dict(self._named_parameters())
        names = {id(parameter): name for name, parameter in parameters.items()}
        every_name = self._named_parameters(remove_duplicate=False)
        aliases = {name: names[id(parameter)] for name, parameter in every_name if name not in parameters}
        by_layer = {name: self._macs[name] for name in parameters if name in self._macs}
        weights = [parameters[name] for name in by_layer]
        nonzeros = count_nonzeros(weights).tolist()
        densities = {
            name: Fraction(count, weight.numel())
            for name, count, weight in zip(by_layer, nonzeros, weights, strict=True)
        }
        return FlopCount(by_layer, self._macs[_REST], densities, dict(self._uncounted), aliases)

    def _label(self, module: nn.Module) -> str:
        where = next(name for name, candidate in self.module.named_modules() if candidate is module)
        return f"`{where}` ({type(module).__name__})" if where else type(module).__name__

    def _named_parameters(self, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters under the names that they have without `torch.compile`."""
        for name, parameter in self.module.named_parameters(remove_duplicate=remove_duplicate):
            yield name.replace("_orig_mod.", ""), parameter

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Trace a call unless it is part of one that has been traced, or the module is known to be untraceable."""
        idle = self._inside is None and torch._C._get_tracing_state() is None  # of any recorder
        if not idle or module in self._failed or _is_redirected(module):
            return
        if _gathers_parts(module):
            self._uncounted[f"all but the layers inside {self._label(module)}, whose parts are sharded"] = 1
        else:
            self._inside = module  # the trace fires these hooks too
            self._inside = module if self.trace(module, args, kwargs) else None

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Leave the outermost traced call."""
        if self._inside is module and torch._C._get_tracing_state() is None:
            self._inside = None


def _is_redirected(module: nn.Module) -> bool:
    """Whether the call is not the module's own forward, as when DDP runs a whole training step through it."""
    forward = vars(module).get("forward")
    return forward is not None and not hasattr(forward, "_torchdynamo_orig_callable")


def _gathers_parts(module: nn.Module) -> bool:
    """Whether FSDP2 gathers weights while the module runs, which cannot be traced."""
    return any(isinstance(part, FSDPModule) for part in module.modules() if part is not module)


class _Flat(nn.Module):
    """Show a call as a function from tensors to tensors, which is all that the tracer accepts.

    The module is not registered as a child, so that the tracer neither hooks nor renames anything in it, and its
    parameters come first among the inputs that the tracer adds to the graph, whatever its ``state_dict`` does.
    """

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        # What FSDP2 does around the call of its module has been done.
        self.call: Callable[..., Any] = module.forward if isinstance(module, FSDPModule) else module.__call__
        self._parameters.update({str(i): parameter for i, parameter in enumerate(module.parameters())})
        self._buffers.update({f"buffer{i}": buffer for i, buffer in enumerate(module.buffers())})
        self.leaves, self.spec = tree_flatten((args, dict(kwargs)))
        # One tensor given twice stays one: attention, for one, compares its inputs with `is`.
        unique = {id(leaf): leaf for leaf in self.leaves if isinstance(leaf, Tensor)}
        self.ids = list(unique)
        self.tensors = tuple(tensor.detach().clone() for tensor in unique.values())

    def run(self, *tensors: Tensor) -> Any:
        by_id = dict(zip(self.ids, tensors, strict=True))
        args, kwargs = tree_unflatten([by_id.get(id(leaf), leaf) for leaf in self.leaves], self.spec)
        return self.call(*args, **kwargs)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = tuple(_find_tensors(self.run(*tensors), set()))
        if not outputs:
            raise ValueError("Expected the output of the module to hold a tensor, but found none.")
        return outputs


def _find_tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Yield the tensors in any output; the tracer drops the work that leads to none of them."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, type | nn.Module) and id(leaf) not in seen:
            seen.add(id(leaf))
            yield from _find_tensors(vars(leaf), seen)


def _trace(flat: _Flat, names: list[str]) -> tuple[Counter[str], Counter[str]]:
    """Return the counts by parameter name and the operators that were not counted."""
    sources = [_REST] * len(flat.tensors) + names + [_REST] * len(flat._buffers)

    def find_weight(value: Value) -> str:
        while value.node().kind() in _VIEWS:
            value = value.node().inputsAt(0)
        return sources[value.offset()] if value.node().kind() == "prim::Param" else _REST

    def make_handle(count: Callable[[list[Value], Value], Work]) -> Callable[[list[Value], list[Value]], Counter[str]]:
        def handle(inputs: list[Value], outputs: list[Value]) -> Counter[str]:
            macs: Counter[str] = Counter()
            for amount, operands in count(inputs, outputs[0]):
                macs[next(filter(None, map(find_weight, operands)), _REST)] += amount
            return macs

        return handle

    analysis = FlopCountAnalysis(flat, flat.tensors).clear_op_handles()
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.set_op_handle(**{name: make_handle(count) for name, count in WORK.items()})
    return analysis.by_operator(), analysis.unsupported_ops()


def readable(macs: float) -> str:
    """Write a number with at most four significant digits and a unit.

    Example:
        >>> readable(4_089_184_256), readable(64.0)
        ('4.089 G', '64')
    """
    power = min(max(len(str(int(macs))) - 1, 0) // 3, 4)
    return f"{macs / 1000**power:.4g} {' kMGT'[power]}".rstrip()
