"""Whether a layer runs faster for its zeros: by rule in each runtime, and measured where that is possible.

All rules are in :data:`RULES`, with where they come from. None of them is derived from FLOPs.
"""

import dataclasses
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_sparse.export.acceleration import Acceleration, accelerate
from lightning_sparse.export.csr import DTYPES

__all__ = ["RULES", "Condition", "Explanation", "LayerFacts", "Rule", "Verdict", "explain"]


@dataclass(frozen=True)
class LayerFacts:
    """What the rules ask of a layer.

    Attributes:
        name: Its name.
        kind: ``"Linear"`` or ``"Conv2d"``.
        shape: Shape of its weight.
        dtype: Type of its weight.
        sparsity: Fraction of zeros in its weight, in ``[0, 1]``.
        dead_outputs: Number of outputs whose weights are all zero.
        dead_inputs: Number of inputs whose weights are all zero.
        is_2_4: Whether at most two of each four consecutive inputs have a weight.
        rows: Number of rows of the matrix that it is given; None if unknown.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    sparsity: float
    dead_outputs: int
    dead_inputs: int
    is_2_4: bool
    rows: int | None = None


@dataclass(frozen=True)
class Condition:
    """One thing that a runtime needs to gain from zeros: in words, and as a test."""

    words: str
    holds: Callable[[LayerFacts], bool]


@dataclass(frozen=True)
class Rule:
    """When a runtime gains from zeros.

    Attributes:
        runtime: The runtime.
        needs: All that must hold, the shape and pattern of the layer first, the machine last.
        source: Where the rule comes from.
    """

    runtime: str
    needs: tuple[Condition, ...]
    source: str


def _has_mkl() -> bool:
    return torch._C.has_mkl


def _has_amx() -> bool:
    return bool(torch.cpu.get_capabilities().get("amx_int8", False))


def _has_sparse_tensor_cores() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def _is_small(layer: LayerFacts) -> bool:
    return layer.kind == "Linear" and torch.Size(layer.shape).numel() < 1024 * 1024


def _has_zeros_enough(layer: LayerFacts) -> bool:
    return layer.kind != "Linear" or layer.sparsity >= (0.9 if (layer.rows or 1) > 64 else 0.8)


_LINEAR = Condition("a linear layer", lambda layer: layer.kind == "Linear")
_NARROW = (torch.float16, torch.bfloat16)

RULES = (
    Rule(
        "PyTorch, dense (also compiled)",
        (Condition("kernels that skip zeros", lambda layer: False),),
        "docs/inference.md: the dense models there have their zeros",
    ),
    Rule(
        "PyTorch, CSR with 32-bit indices (accelerate)",
        (
            Condition("one matrix, not groups", lambda layer: layer.kind in ("Linear", "Conv2d")),
            Condition("float32 or float64", lambda layer: layer.dtype in DTYPES),
            Condition("at least 1024×1024 weights in a linear layer", lambda layer: not _is_small(layer)),
            Condition("at least 80 % zeros in a linear layer, 90 % with more than 64 rows", _has_zeros_enough),
            Condition(
                "at least 90 % zeros in a convolution, of 1×1 pixels",
                lambda layer: layer.kind == "Linear" or (layer.sparsity >= 0.9 and layer.shape[2:] == (1, 1)),
            ),
            Condition("an x86-64 CPU, where PyTorch has MKL", lambda layer: _has_mkl()),
        ),
        "docs/inference.md: single layers",
    ),
    Rule(
        "OpenVINO, sparse weights decompression",
        (
            _LINEAR,
            Condition(
                "numbers of outputs and inputs that 64 divides", lambda layer: not any(n % 64 for n in layer.shape)
            ),
            Condition("more than 50 % zeros", lambda layer: layer.sparsity > 0.5),
            Condition("one row at a time", lambda layer: layer.rows in (None, 1)),
            Condition("weights quantized to int8", lambda layer: layer.dtype == torch.int8),
            Condition("a CPU with AMX", lambda layer: _has_amx()),
        ),
        "https://docs.openvino.ai, CPU device, limitations of sparse weights decompression",
    ),
    Rule(
        "ONNX Runtime",
        (Condition("kernels that skip zeros", lambda layer: False),),
        "https://github.com/microsoft/onnxruntime/issues/5578: sparse initializers become dense on loading",
    ),
    Rule(
        "any dense engine, after slimming",
        (
            Condition(
                "outputs or inputs that are entirely zero", lambda layer: layer.dead_outputs + layer.dead_inputs > 0
            ),
        ),
        "what is left is a smaller dense layer",
    ),
    Rule(
        "NVIDIA GPU, 2:4 (to_sparse_semi_structured)",
        (
            _LINEAR,
            Condition("at most 2 of 4 consecutive weights of an output", lambda layer: layer.is_2_4),
            Condition(
                "32 to divide the number of outputs, 64 that of inputs",
                lambda layer: layer.shape[0] % 32 == 0 and layer.shape[1] % 64 == 0,
            ),
            Condition("float16 or bfloat16", lambda layer: layer.dtype in _NARROW),
            Condition("compute capability 8.0 (Ampere) or more", lambda layer: _has_sparse_tensor_cores()),
        ),
        "torch/sparse/semi_structured.py (CUTLASS), cuSPARSELt release notes 0.0.1",
    ),
)


@dataclass(frozen=True)
class Verdict:
    """The answer for one layer in one runtime.

    Attributes:
        layer: Name of the layer.
        runtime: The runtime.
        faster: Whether the layer runs faster for its zeros; as measured, where that was done.
        reason: What is missing, or what is there.
        measured: How many times as fast as the dense layer it was; None if it was not measured.
    """

    layer: str
    runtime: str
    faster: bool
    reason: str
    measured: float | None = None


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` has found. Prints by runtime, layers with the same answer together.

    Attributes:
        layers: The layers.
        lines: One for each layer and runtime.
        acceleration: The measurement, if there was one.
    """

    layers: list[LayerFacts]
    lines: list[Verdict]
    acceleration: Acceleration | None = None

    def to_dict(self) -> dict[str, Any]:
        """The lines as numbers, strings, lists and dicts."""
        return {"lines": [dataclasses.asdict(line) for line in self.lines]}

    def __str__(self) -> str:
        """For each runtime, what it needs, and the layers by answer."""
        text = [part for rule in RULES for part in ("", rule.runtime, *self._answers(rule))]
        if self.acceleration:
            text += ["", f"Whole model: {self.acceleration.verdict}"]
        return "\n".join(text[1:])

    def _answers(self, rule: Rule) -> Iterator[str]:
        yield from _wrap("needs", "; ".join(need.words for need in rule.needs))
        yield from _wrap("source", rule.source)
        answers: dict[tuple[bool, str], list[Verdict]] = {}
        for line in self.lines:
            if line.runtime == rule.runtime:
                answers.setdefault((line.faster, line.reason), []).append(line)
        for (faster, reason), lines in sorted(answers.items(), key=lambda answer: not answer[0][0]):
            names = [line.layer or "the model" for line in lines]
            shown = ", ".join(names[:4]) + (f", ..., {names[-1]}" if len(names) > 4 else "")
            count = "1 layer" if len(lines) == 1 else f"{len(lines)} layers"
            gains = sorted(f"{line.measured:.2f} ×" for line in lines if line.measured is not None)
            measured = f", {' to '.join(dict.fromkeys((gains[0], gains[-1])))} as fast" if gains else ""
            yield from _wrap("yes" if faster else "no", f"{count} ({shown}): {reason}{measured}")


def _wrap(title: str, text: str) -> list[str]:
    return textwrap.wrap(text, 110, initial_indent=f"  {title:<8}", subsequent_indent=" " * 10)


def explain(model: nn.Module, example_inputs: Any = None, *, seconds: float = 4.0) -> Explanation:
    """Tell for each linear layer and convolution, and for each runtime, whether zeros make it faster, and why not.

    Args:
        model: Any model, sparse or not; it is not changed.
        example_inputs: What it is called with, as in :func:`~lightning_sparse.export.accelerate`. With them, and on a
            CPU, the sparse kernels of PyTorch are measured too.
        seconds: How long to measure.

    Returns:
        A line for each layer and runtime: print it.

    Raises:
        TypeError: If the model is compiled already.

    Example:
        >>> layer = nn.Linear(1024, 1024)
        >>> with torch.no_grad():
        ...     _ = layer.weight.masked_fill_(torch.rand(1024, 1024) < 0.75, 0.0)
        >>> [line.reason for line in explain(layer).lines if "CSR" in line.runtime]
        ['lacks at least 80 % zeros in a linear layer, 90 % with more than 64 rows']
    """
    on_cpu = all(tensor.is_cpu for tensor in (*model.parameters(), *model.buffers()))
    report: Acceleration | None = None
    if example_inputs is not None and on_cpu:
        report = vars(accelerate(model, example_inputs, seconds=seconds))["acceleration"]
    times = {} if report is None else {layer.name: layer for layer in report.layers}
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            rows = times[name].rows if name in times else ()
            layers.append(_look_at(name, module, max(rows, default=None)))
    lines = []
    for layer in layers:
        measured = times.get(layer.name)
        for rule in RULES:
            line = _apply(rule, layer)
            if rule.runtime.startswith("PyTorch, CSR") and measured is not None and measured.dense and measured.sparse:
                gain = measured.dense / measured.sparse
                reason = "measured" if measured.kernel == "CSR" else f"measured: {measured.reason}"
                line = dataclasses.replace(line, faster=measured.kernel == "CSR", reason=reason, measured=gain)
            lines.append(line)
    return Explanation(layers, lines, report)


def _look_at(name: str, module: nn.Linear | nn.Conv2d, rows: int | None) -> LayerFacts:
    weight = module.weight.detach()
    kept = (weight != 0).flatten(1)
    grouped = isinstance(module, nn.Conv2d) and module.groups > 1
    return LayerFacts(
        name,
        f"grouped {type(module).__name__}" if grouped else "Conv2d" if isinstance(module, nn.Conv2d) else "Linear",
        tuple(weight.shape),
        weight.dtype,
        sparsity=1 - int(kept.sum()) / max(1, kept.numel()),
        dead_outputs=int((~kept.any(1)).sum()),
        dead_inputs=int((~(weight != 0).transpose(0, 1).flatten(1).any(1)).sum()),
        is_2_4=kept.shape[1] % 4 == 0 and bool((kept.view(-1, 4).sum(1) <= 2).all()),
        rows=rows,
    )


def _apply(rule: Rule, layer: LayerFacts) -> Verdict:
    missing = [need.words for need in rule.needs if not need.holds(layer)]
    return Verdict(
        layer.name, rule.runtime, not missing, f"lacks {'; '.join(missing)}" if missing else "has all of this"
    )
