"""Each rule says yes where all holds that it needs, and no where one thing is missing."""

import dataclasses

import pytest
import torch
from torch import nn

from lightning_sparse.export import explain, explanation
from lightning_sparse.export.explanation import RULES, LayerFacts
from tests.export.test_acceleration import SPARSE_WINS, give_times, pruned

CSR, OPENVINO, SLIM, TWO_OF_FOUR = (RULES[place].runtime for place in (1, 2, 4, 5))
IDEAL = {
    CSR: LayerFacts("a", "Linear", (1024, 1024), torch.float32, 0.8, 0, 0, is_2_4=False),
    OPENVINO: LayerFacts("a", "Linear", (64, 128), torch.int8, 0.6, 0, 0, is_2_4=False, rows=1),
    SLIM: LayerFacts("a", "Conv2d", (8, 4, 3, 3), torch.float32, 0.1, 0, 1, is_2_4=False),
    TWO_OF_FOUR: LayerFacts("a", "Linear", (96, 128), torch.bfloat16, 0.5, 0, 0, is_2_4=True),
}


@pytest.fixture
def any_machine(monkeypatch):
    for name in ("_has_amx", "_has_sparse_tensor_cores", "_has_mkl"):
        monkeypatch.setattr(explanation, name, lambda: True)


def answer(runtime, **changes):
    rule = next(rule for rule in RULES if rule.runtime == runtime)
    return explanation._apply(rule, dataclasses.replace(IDEAL[runtime], **changes))


@pytest.mark.parametrize("runtime", IDEAL)
def test_yes_where_all_holds(runtime, any_machine):
    line = answer(runtime)
    assert line.faster
    assert line.reason == "has all of this"


@pytest.mark.parametrize(
    ("runtime", "changes", "reason"),
    [
        (CSR, {"sparsity": 0.79}, "lacks at least 80 % zeros in a linear layer"),
        (CSR, {"rows": 65}, "lacks at least 80 % zeros in a linear layer, 90 % with more than 64 rows"),
        (CSR, {"shape": (1023, 1024)}, "lacks at least 1024×1024 weights"),
        (CSR, {"dtype": torch.bfloat16}, "lacks float32 or float64"),
        (CSR, {"kind": "grouped Conv2d", "shape": (512, 512, 1, 1), "sparsity": 0.9}, "lacks one matrix, not groups"),
        (CSR, {"kind": "Conv2d", "shape": (512, 512, 3, 3), "sparsity": 0.9}, "lacks at least 90 % zeros in a conv"),
        (CSR, {"kind": "Conv2d", "shape": (512, 512, 1, 1)}, "lacks at least 90 % zeros in a conv"),
        (OPENVINO, {"kind": "Conv2d"}, "lacks a linear layer"),
        (OPENVINO, {"shape": (64, 100)}, "lacks numbers of outputs and inputs that 64 divides"),
        (OPENVINO, {"rows": 2, "dtype": torch.float32}, "lacks one row at a time; weights quantized to int8"),
        (OPENVINO, {"sparsity": 0.5}, "lacks more than 50 % zeros"),
        (SLIM, {"dead_inputs": 0}, "lacks outputs or inputs that are entirely zero"),
        (TWO_OF_FOUR, {"is_2_4": False}, "lacks at most 2 of 4"),
        (TWO_OF_FOUR, {"shape": (96, 96)}, "lacks 32 to divide"),
        (TWO_OF_FOUR, {"dtype": torch.float32}, "lacks float16 or bfloat16"),
    ],
)
def test_no_where_one_thing_is_missing(runtime, changes, reason, any_machine):
    line = answer(runtime, **changes)
    assert not line.faster
    assert line.reason.startswith(reason)


@pytest.mark.parametrize(
    ("runtime", "machine", "reason"),
    [
        (CSR, "_has_mkl", "lacks an x86-64 CPU"),
        (OPENVINO, "_has_amx", "lacks a CPU with AMX"),
        (TWO_OF_FOUR, "_has_sparse_tensor_cores", "lacks compute capability 8.0"),
    ],
)
def test_no_on_another_machine(runtime, machine, reason, any_machine, monkeypatch):
    monkeypatch.setattr(explanation, machine, lambda: False)
    assert answer(runtime).reason.startswith(reason)


@pytest.mark.parametrize("runtime", [RULES[0].runtime, RULES[3].runtime])
def test_dense_kernels_gain_nothing(runtime):
    line = next(line for line in explain(pruned(nn.Linear(512, 512), 0.99)).lines if line.runtime == runtime)
    assert line == explanation.Verdict("", runtime, faster=False, reason="lacks kernels that skip zeros")


def test_layers_are_looked_at():
    model = nn.Sequential(nn.Linear(8, 4), nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(3, 5, 1), nn.ReLU())
    with torch.no_grad():
        model[0].weight[:] = torch.tensor([1.0, 0.0, 0.0, 2.0]).repeat(4, 2)
        model[0].weight[1] = 0
        model[2].weight[:, 1:] = 0
    linear, grouped, conv = explain(model).layers
    assert linear == LayerFacts("0", "Linear", (4, 8), torch.float32, 5 / 8, 1, 4, is_2_4=True)
    assert (grouped.kind, grouped.sparsity, grouped.is_2_4) == ("grouped Conv2d", 0.0, False)
    assert (conv.dead_outputs, conv.dead_inputs, conv.is_2_4) == (0, 2, False)


def test_a_measurement_beats_the_rule(monkeypatch):
    model = pruned(nn.Sequential(*(nn.Linear(20, 20) for _ in range(3))))
    nn.init.ones_(model[2].weight)
    give_times(monkeypatch, {"1: CSR": 4.0, **SPARSE_WINS})
    found = explain(model, torch.randn(6, 20))
    lines = [(line.layer, line.faster, line.measured) for line in found.lines if line.runtime == CSR]
    assert lines == [("0", True, 2.0), ("1", False, 0.5), ("2", False, None)]
    assert [layer.rows for layer in found.layers] == [6, 6, 6]
    assert len(found.lines) == len(found.to_dict()["lines"]) == len(RULES) * 3
    text = str(found)
    assert "  yes     1 layer (0): measured, 2.00 × as fast\n" in text
    assert "  no      1 layer (1): measured: not faster, 0.50 × as fast\n" in text
    assert "  no      3 layers (0, 1, 2): lacks kernels that skip zeros\n" in text
    assert text.endswith("Whole model: Accelerated: 2.00 times as fast as dense.")
    assert all(rule.source in text for rule in RULES if len(rule.source) < 90)


def test_what_cannot_be_measured_is_explained_by_rule():
    found = explain(pruned(nn.Linear(256, 256)).bfloat16(), torch.randn(1, 256).bfloat16())
    assert all(line.measured is None for line in found.lines)
