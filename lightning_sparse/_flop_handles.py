"""Multiply-accumulates of every operator that is counted, read from the values of a traced graph.

To count a further operator, write one function from its inputs and its first output to the work in it, and add it to
``WORK``.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["WORK", "Value", "Work"]

Value = Any  # torch._C.Value, which has no public type
Work = list[tuple[int, list[Value]]]  # multiply-accumulates, and the operands among which to look for a weight


def _shape(value: Value) -> list[int]:
    return list(value.type().sizes())


def _linear(inputs: list[Value], output: Value) -> Work:
    x, weight = inputs[:2]
    return [(math.prod(_shape(x)[:-1]) * math.prod(_shape(weight)), [weight, x])]


def _matmul(inputs: list[Value], output: Value) -> Work:
    a, b = inputs[-2:]
    return [(math.prod(_shape(output)) * _shape(a)[-1], [b, a])]


def _addmm(inputs: list[Value], output: Value) -> Work:
    return _matmul(inputs[1:3], output)


def _addbmm(inputs: list[Value], output: Value) -> Work:
    a, b = inputs[1:3]  # the output is summed over the batch
    return [(math.prod(_shape(a)) * _shape(b)[-1], [b, a])]


def _tensordot(inputs: list[Value], output: Value) -> Work:
    a, b = inputs[:2]
    # (n, k) times (k, m): the root of nk · km · nm is nkm.
    return [(math.isqrt(math.prod(_shape(a) + _shape(b) + _shape(output))), [b, a])]


def _convolution(inputs: list[Value], output: Value) -> Work:
    x, weight = inputs[:2]
    transposed = len(inputs) > 7 and inputs[6].toIValue()  # `_convolution_mode` has 7 inputs and is never transposed
    pixels = math.prod(_shape(x if transposed else output))
    return [(pixels * math.prod(_shape(weight)[1:]), [weight, x])]


def _attention(inputs: list[Value], output: Value) -> Work:
    query, key, value = map(_shape, inputs[:3])
    rows = math.prod(_shape(output)[:-1])
    return [(rows * key[-2] * (query[-1] + value[-1]), [])]


def _recurrent(inputs: list[Value], output: Value) -> Work:
    steps = math.prod(_shape(inputs[0])[:-1])  # time × batch, or the length of the packed data
    lists = [value.node().inputs() for value in inputs if value.node().kind() == "prim::ListConstruct"]
    # Biases have one dimension and states three.
    weights = [v for values in lists for v in values if v.isCompleteTensor() and len(_shape(v)) == 2]
    return [(steps * math.prod(_shape(weight)), [weight]) for weight in weights]


def _bilinear(inputs: list[Value], output: Value) -> Work:
    x, _, weight = inputs[:3]
    return [(math.prod(_shape(x)[:-1]) * math.prod(_shape(weight)), [weight])]


def _einsum(inputs: list[Value], output: Value) -> Work:
    """Contract pair by pair, in the order in which torch does it."""
    values = list(inputs[1].node().inputs())
    terms, kept = _parse_einsum(inputs[0].toIValue(), [len(_shape(value)) for value in values])
    sizes: dict[Any, int] = {}
    todo: list[tuple[set[Any], list[Value]]] = []
    for term, value in zip(terms, values, strict=True):
        own = {label: size for label, size in zip(term, _shape(value), strict=True) if size != 1}  # 1 is broadcast
        sizes |= own
        todo.append((set(own), [value]))
    path = [v.toIValue() for v in inputs[2].node().inputs()] if len(inputs) > 2 else []
    work: Work = []
    while len(todo) > 1:
        first, second = sorted((path.pop(0), path.pop(0))) if path else (0, 1)
        (right, b), (left, a) = todo.pop(second), todo.pop(first)
        needed = kept.union(*(term for term, _ in todo))
        # An index of one operand only that nothing needs later is summed before the product.
        labels = ((left | right) & needed) | (left & right)
        work.append((math.prod(sizes[label] for label in labels), [*b, *a]))
        todo.insert(len(todo) if path else 0, (labels & needed, []))
    return work


def _parse_einsum(equation: str, ndims: Iterable[int]) -> tuple[list[list[Any]], set[Any]]:
    """Return the labels of every operand and of the output; the dimensions of an ellipsis are called -1, -2, ..."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms: list[list[Any]] = []
    for term, ndim in zip(left.split(","), ndims, strict=True):
        head, dots, tail = term.partition("...")
        hidden = range(len(head) + len(tail) - ndim, 0) if dots else ()
        terms.append([*head, *hidden, *tail])
    letters = Counter(label for term in terms for label in term)
    hidden_labels = {label for label in letters if isinstance(label, int)}
    if arrow:
        return terms, set(right.replace(".", "")) | (hidden_labels if "..." in right else set())
    return terms, {label for label, times in letters.items() if times == 1} | hidden_labels


WORK: dict[str, Callable[[list[Value], Value], Work]] = {
    f"aten::{name}": count
    for count, names in {
        _linear: "linear",
        _matmul: "matmul linalg_matmul mm bmm mv dot vdot inner",
        _addmm: "addmm addmm_ addmv addmv_ baddbmm baddbmm_",
        _addbmm: "addbmm addbmm_",
        _tensordot: "tensordot",
        _einsum: "einsum",
        _convolution: "_convolution _convolution_mode",
        _attention: "scaled_dot_product_attention",
        _recurrent: "lstm gru rnn_tanh rnn_relu",
        _bilinear: "bilinear",
    }.items()
    for name in names.split()
}
