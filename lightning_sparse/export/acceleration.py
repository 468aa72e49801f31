"""A model whose sparse layers skip their zeros, wherever that was measured to be faster."""

import copy
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_sparse.export.calls import arguments, copy_model
from lightning_sparse.export.csr import DTYPES, CSRConv2d, CSRLinear
from lightning_sparse.export.timing import time_calls
from lightning_sparse.functional import count_nonzeros

__all__ = ["Acceleration", "LayerTime", "accelerate"]

# A kernel must be faster by this factor, and by more than two measurements of the dense layer differ.
MARGIN = 1.05
# CSR takes twice the bytes of a dense weight for each one that is left.
LEAST_SPARSITY = 0.5
_LARGEST_INDEX = 2**31 - 1
_TIMES = ("dense", "dense, again", "CSR")


@dataclass(frozen=True)
class LayerTime:
    """One layer, and what was measured of it.

    Attributes:
        name: Name of the layer.
        kind: Its class.
        shape: Shape of its weight.
        sparsity: Fraction of zeros in its weight, in ``[0, 1]``.
        rows: Of the matrices that it is given: inputs of a linear layer, patches of a convolution.
        kernel: What it runs as, ``"CSR"`` or ``"dense"``.
        dense: Seconds of the dense layer; None if it was not measured.
        sparse: Seconds of the sparse one.
        reason: Why it is dense.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    sparsity: float
    rows: tuple[int, ...] = ()
    kernel: str = "dense"
    dense: float | None = None
    sparse: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Acceleration:
    """What :func:`accelerate` has measured and decided. Prints as a table.

    Attributes:
        layers: All linear layers and convolutions.
        seconds: Of the whole model: ``"dense"``, ``"dense, again"`` (their difference is noise), ``"accelerated"`` and,
            where the model runs in it, ``"dense in bfloat16"``.
        verdict: What follows from that.
        threads: With how many threads it was measured.
    """

    layers: list[LayerTime]
    seconds: dict[str, float]
    verdict: str
    threads: int

    @property
    def accelerated(self) -> list[str]:
        """Names of the layers that are sparse."""
        return [layer.name for layer in self.layers if layer.kernel != "dense"]

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, strings, lists and dicts."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """The tables in plain text."""
        titles = ["layer", "kind", "shape", "rows", "zeros", "kernel", "dense µs", "sparse µs", "why dense"]
        layers = [
            [
                layer.name,
                layer.kind,
                "×".join(map(str, layer.shape)),
                ", ".join(map(str, layer.rows)),
                f"{layer.sparsity:.1%}",
                layer.kernel,
                *("–" if time is None else f"{1e6 * time:.1f}" for time in (layer.dense, layer.sparse)),
                layer.reason,
            ]
            for layer in self.layers
        ]
        times = [[name, f"{1e3 * seconds:.3f} ms"] for name, seconds in self.seconds.items()]
        return "\n".join([*align([titles, *layers]), *align(times), f"{self.verdict} ({self.threads} threads)"])


def align(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, of which all columns begin at the same place."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def accelerate(
    model: nn.Module,
    example_inputs: Any,
    *,
    layers: Collection[str] | None = None,
    compiled: bool = False,
    seconds: float = 4.0,
) -> nn.Module:
    """Copy a model for inference on this CPU, with sparse kernels in the layers where they are faster.

    Each ``nn.Linear``, and each ``nn.Conv2d`` without groups, is timed as it is and as CSR with 32-bit indices, on the
    inputs that it gets in the example, in turns with all other layers. It becomes sparse where that is faster beyond
    noise. In the end the same is asked of the whole model: the result is never slower than the dense one.

    The result is an ordinary module: it takes other batches too, is saved, loaded, copied and compiled, and its state
    dict is that of the dense model. It has no gradients. Its outputs are those of the dense model up to rounding.

    Args:
        model: The model, on the CPU; it is not changed.
        example_inputs: What it is called with: a tensor, a tuple of arguments or a dict of keyword arguments. The
            result is fast for inputs of these shapes.
        layers: Names of the layers to make sparse, to do without measuring what is known, such as
            ``result.acceleration.accelerated``.
        compiled: Whether to time the dense model under ``torch.compile`` too, which takes long, for the verdict.
        seconds: How long to measure, > 0, half of it layers, half of it whole models; each runs at least 7 times.

    Returns:
        The copy, in evaluation mode. Its attribute ``acceleration`` is an :class:`Acceleration`: print it.

    Raises:
        TypeError: If the model is compiled already; compile the result.
        ValueError: If the model is not on the CPU, or if one of ``layers`` cannot be sparse.

    Note:
        Times hold for this machine, its number of threads and inputs of these shapes. Dense bfloat16 may be faster than
        sparse float32 on a CPU that has units for it; the verdict says so.

        An input that is infinite or not a number makes no difference where it meets a zero.

    Example:
        >>> model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
        >>> with torch.no_grad():
        ...     _ = model[0].weight.masked_fill_(torch.rand(512, 512) < 0.95, 0.0)
        >>> fast = accelerate(model, torch.randn(1, 512), seconds=0.1)
        >>> torch.allclose(fast(torch.ones(1, 512)), model(torch.ones(1, 512)), atol=1e-5)
        True
        >>> [layer.reason for layer in fast.acceleration.layers][1]
        'fewer than 50 % zeros'
    """
    _check(model)
    dense = copy_model(model).eval().requires_grad_(False)
    times: dict[str, float] = {}
    with torch.no_grad():
        candidates = _candidates(dense, example_inputs)
        if layers is None:
            _choose_fastest(candidates, seconds / 2)
        else:
            _choose_named(candidates, layers)
        fast = _install(dense, candidates)
        if layers is None:
            times = _time_models(dense, fast, example_inputs, compiled, seconds / 2)
            if not _is_faster(times, "accelerated"):
                fast = dense
                for candidate in candidates:
                    candidate.leave_dense("faster by itself, but not in the whole model")
    rows = [candidate.row for candidate in candidates]
    verdict = _verdict(times) if times else "The layers that were named are sparse; nothing was measured."
    vars(fast)["acceleration"] = Acceleration(rows, times, verdict, torch.get_num_threads())
    return fast


def _check(model: nn.Module) -> None:
    compiled = (torch._dynamo.OptimizedModule, torch.jit.ScriptModule)
    if any(isinstance(m, compiled) or m._compiled_call_impl is not None for m in model.modules()):
        raise TypeError("Expected argument `model` not to be compiled yet. Compile what `accelerate` returns.")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_cpu:
            raise ValueError(
                f"Expected argument `model` to be on the CPU, but got `{name}` on {tensor.device}. Move it, or use 2:4"
                " sparsity on a GPU."
            )


def _call(model: Callable[..., Any], example_inputs: Any) -> Callable[[], Any]:
    args, kwargs = arguments(example_inputs)
    return lambda: model(*args, **kwargs)


class _Candidate:
    """A layer, what it is given, and what becomes of it."""

    def __init__(self, name: str, layer: nn.Linear | nn.Conv2d) -> None:
        self.layer = layer
        self.sparse: CSRLinear | CSRConv2d | None = None
        self.inputs: dict[torch.Size, Tensor] = {}  # one of each shape
        weight = layer.weight
        zeros = weight.numel() - int(count_nonzeros([weight]))
        self.row = LayerTime(name, type(layer).__name__, tuple(weight.shape), zeros / max(1, weight.numel()))

    @property
    def keys(self) -> list[str]:
        """Names of its measurements."""
        return [f"{self.row.name}: {name}" for name in _TIMES]

    def record(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """As a hook: keep what the layer is given."""
        given = args[0] if args else kwargs["input"]
        self.inputs.setdefault(given.shape, given)

    def run(self, layer: nn.Module) -> list[Tensor]:
        return [layer(given) for given in self.inputs.values()]

    def leave_dense(self, reason: str) -> None:
        """Keep the layer, and the first reason for that."""
        self.row = dataclasses.replace(self.row, kernel="dense", reason=self.row.reason or reason)

    def prepare(self) -> None:
        """Make the sparse layer, unless there is a reason against it."""
        if reason := _refusal(self.layer) or ("" if self.inputs else "not called by the example inputs"):
            return self.leave_dense(reason)
        outputs = self.run(self.layer)
        channels = self.layer.weight.shape[0]
        rows = sorted({output.numel() // channels for output in outputs})
        self.row = dataclasses.replace(self.row, rows=tuple(rows))
        if self.row.sparsity < LEAST_SPARSITY:
            return self.leave_dense(f"fewer than {LEAST_SPARSITY:.0%} zeros".replace("%", " %"))
        sparse = CSRLinear(self.layer) if isinstance(self.layer, nn.Linear) else CSRConv2d(self.layer)
        try:
            results = self.run(sparse)
        except RuntimeError as error:  # PyTorch is built without MKL, or the inputs have another type
            return self.leave_dense(f"no sparse kernel here: {str(error).partition(chr(10))[0]}")
        if not all(_agree(*pair) for pair in zip(outputs, results, strict=True)):
            return self.leave_dense("the sparse kernel gives something else")
        self.sparse = sparse
        return None


def _refusal(layer: nn.Linear | nn.Conv2d) -> str:
    """Why a layer cannot be sparse, if it cannot."""
    weight = layer.weight
    conv = layer if isinstance(layer, nn.Conv2d) else None
    reasons = {
        f"a {type(layer).__name__}, which may do more than its base": type(layer) not in (nn.Linear, nn.Conv2d),
        "has hooks": bool(layer._forward_hooks or layer._forward_pre_hooks),
        "its weight is no parameter": "weight" not in layer._parameters,
        f"{str(weight.dtype).removeprefix('torch.')}, not float32 or float64": weight.dtype not in DTYPES,
        "grouped, not one matrix": conv is not None and conv.groups > 1,
        "padded by more than zeros": conv is not None and (conv.padding_mode, type(conv.padding)) != ("zeros", tuple),
        "more weights than 32-bit indices can count": weight.numel() > _LARGEST_INDEX,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _agree(expected: Tensor, found: Tensor) -> bool:
    """Whether two results differ by rounding only."""
    largest = expected.abs().max() if expected.numel() else expected.new_zeros(())
    return bool(((expected - found).abs() <= torch.finfo(expected.dtype).eps ** 0.5 * largest).all())


def _candidates(model: nn.Module, example_inputs: Any) -> list[_Candidate]:
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    candidates = [_Candidate(name, layer) for name, layer in layers]
    hooks = [c.layer.register_forward_pre_hook(c.record, with_kwargs=True) for c in candidates]
    try:
        _call(model, example_inputs)()
    finally:
        for hook in hooks:
            hook.remove()
    for candidate in candidates:
        candidate.prepare()
    return candidates


def _choose_named(candidates: list[_Candidate], names: Collection[str]) -> None:
    known = {candidate.row.name: candidate for candidate in candidates}
    for name in names:
        if name not in known or known[name].sparse is None:
            why = known[name].row.reason if name in known else "no linear layer or convolution"
            raise ValueError(f"Expected argument `layers` to name layers that can be sparse, but {name!r} is {why}.")
    for name, candidate in known.items():
        if name in names:
            candidate.row = dataclasses.replace(candidate.row, kernel="CSR")
        else:
            candidate.leave_dense("not in `layers`")


def _choose_fastest(candidates: list[_Candidate], seconds: float) -> None:
    calls: dict[str, Callable[[], object]] = {}
    for candidate in candidates:
        if candidate.sparse is not None:
            dense, sparse = partial(candidate.run, candidate.layer), partial(candidate.run, candidate.sparse)
            calls |= zip(candidate.keys, (dense, dense, sparse), strict=True)
    taken = time_calls(calls, seconds=seconds) if calls else {}
    for candidate in candidates:
        if candidate.sparse is not None:
            times = dict(zip(_TIMES, (taken[key] for key in candidate.keys), strict=True))
            row = dataclasses.replace(candidate.row, dense=times["dense"], sparse=times["CSR"], kernel="CSR")
            candidate.row = row
            if not _is_faster(times, "CSR"):
                candidate.leave_dense("not faster")


def _is_faster(times: Mapping[str, float], name: str) -> bool:
    """Whether a call is faster than the dense one, by more than noise."""
    once, again = times["dense"], times["dense, again"]
    return times[name] * max(MARGIN, once / again, again / once) < min(once, again)


def _install(model: nn.Module, candidates: list[_Candidate]) -> nn.Module:
    """A model with sparse layers that shares all else with the dense one."""
    chosen = {id(c.layer): c.sparse for c in candidates if c.row.kernel == "CSR"}
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared | chosen)


def _time_models(
    dense: nn.Module, fast: nn.Module, example_inputs: Any, compiled: bool, seconds: float
) -> dict[str, float]:
    call = _call(dense, example_inputs)
    calls = {"dense": call, "dense, again": call, "accelerated": _call(fast, example_inputs)}
    half = copy.deepcopy(dense).bfloat16()
    inputs = tree_map_only(Tensor, lambda t: t.bfloat16() if t.is_floating_point() else t, example_inputs)
    others = {"dense in bfloat16": _call(half, inputs)}
    if compiled:
        others["dense, compiled"] = _call(torch.compile(dense), example_inputs)
        others["dense in bfloat16, compiled"] = _call(torch.compile(half), inputs)
        others["accelerated, compiled"] = _call(torch.compile(fast), example_inputs)
    for name, other in others.items():
        with suppress(Exception):  # a model may insist on its type, or be beyond the compiler
            other()
            calls[name] = other
    return time_calls(calls, seconds=seconds)


def _verdict(times: Mapping[str, float]) -> str:
    dense = min(times["dense"], times["dense, again"])
    gain = f"{dense / times['accelerated']:.2f} times as fast as dense"
    text = f"Accelerated: {gain}." if _is_faster(times, "accelerated") else f"Left dense: with zeros skipped {gain}."
    ours = min(time for name, time in times.items() if name.startswith("accelerated"))
    best = min((name for name in times if name.startswith("dense")), key=times.__getitem__)
    if times[best] * MARGIN < min(ours, dense):
        text += f" {best.capitalize()} is {min(ours, dense) / times[best]:.2f} times as fast as that: consider it."
    return text
