"""Sparse kernels where they are faster; that they are is never assumed here: the times are given."""

import copy
import re
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lightning_sparse.export import accelerate, acceleration, load_sparse, save_sparse
from lightning_sparse.export.csr import CSRConv2d, CSRLinear
from tests.helpers.architectures import Attention, Chain, Tied
from tests.helpers.models import CLASSES, Classifier, fit

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def pruned(model, sparsity=0.8):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.masked_fill_(torch.rand_like(parameter) < sparsity, 0.0)
    return model


def give_times(monkeypatch, times):
    """Let the measurement find what `times` says, by the end of the name of a call."""

    def time_calls(calls, *, seconds):
        for call in calls.values():
            call()
        return {name: next(time for end, time in times.items() if name.endswith(end)) for name in calls}

    monkeypatch.setattr(acceleration, "time_calls", time_calls)


SPARSE_WINS = {"CSR": 1.0, "accelerated": 1.0, "dense": 2.0, "dense, again": 2.0, "bfloat16": 3.0}


@pytest.fixture
def sparse_wins(monkeypatch):
    give_times(monkeypatch, SPARSE_WINS)


def make_mlp():
    return Chain(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10, bias=False), nn.Tanh(), nn.Linear(10, 3))


def make_convolutions():
    return Chain(
        nn.Conv2d(4, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 8, 1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1, stride=2),
        nn.Conv2d(8, 5, (2, 3), stride=(1, 2), padding=(2, 1), dilation=(1, 2)),
        nn.Flatten(),
        nn.Linear(30, 3),
    )


MODELS = {
    "mlp": (make_mlp, (20,), 3),
    "convolutions": (make_convolutions, (4, 6, 6), 5),
    "attention": (Attention, (1, 6, 6), 3),
    "tied": (Tied, (1, 6, 6), 2),
}


@pytest.mark.parametrize("example", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_the_dense_model(name, example, sparse_wins):
    make, shape, swapped = MODELS[name]
    model = pruned(make())
    before, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    fast = accelerate(model, torch.randn(example, *shape))
    assert len(fast.acceleration.accelerated) == swapped
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    assert dict(model.named_modules()) == modules, "the given model has other modules"
    assert model.training
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    model.eval()
    for batch in (1, 2, 7):
        x = torch.randn(batch, *shape)
        torch.testing.assert_close(fast(x), model(x), **CLOSE)


@pytest.mark.parametrize("shape", [(20,), (1, 20), (0, 20), (2, 3, 20), (2, 0, 20)])
def test_linear_layers_take_any_number_of_dimensions(shape):
    layer = pruned(nn.Linear(20, 7))
    x = torch.randn(shape)
    found = CSRLinear(layer)(x)
    torch.testing.assert_close(found, layer(x), **CLOSE)
    assert found.is_contiguous()


@pytest.mark.parametrize("shape", [(4, 5, 6), (0, 4, 5, 6), (3, 4, 6, 5)])
@pytest.mark.parametrize(
    "geometry", [{}, {"stride": 2}, {"padding": 1}, {"kernel_size": 3, "dilation": 2, "padding": 2}]
)
def test_convolutions_take_any_geometry(shape, geometry):
    layer = pruned(nn.Conv2d(4, 7, **{"kernel_size": 1, **geometry}))
    for x in (torch.randn(shape), torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)):
        torch.testing.assert_close(CSRConv2d(layer)(x), layer(x), **CLOSE)


def test_float64_and_no_weight_at_all(sparse_wins):
    model = nn.Sequential(pruned(nn.Linear(20, 9)), nn.Linear(9, 4)).double()
    nn.init.zeros_(model[1].weight)
    x = torch.randn(3, 20, dtype=torch.float64)
    fast = accelerate(model, x)
    assert fast.acceleration.accelerated == ["0", "1"]
    torch.testing.assert_close(fast(x), model(x), rtol=1e-12, atol=1e-13)


def test_layers_become_sparse_only_where_that_is_faster_beyond_noise(monkeypatch):
    model = pruned(nn.Sequential(*(nn.Linear(20, 20) for _ in range(4))))
    layers = {"0: CSR": 1.9, "1: CSR": 2.0, "2: CSR": 1.7, "2: dense, again": 2.5, "3: CSR": 1.5}
    give_times(monkeypatch, {**layers, **SPARSE_WINS})
    x = torch.randn(1, 20)
    fast = accelerate(model, x)
    assert fast.acceleration.accelerated == ["0", "3"], "2 has gained less than its two dense times differ"
    assert [layer.reason for layer in fast.acceleration.layers] == ["", "not faster", "not faster", ""]
    assert type(fast[1]) is nn.Linear
    assert torch.equal(fast[1](x), model[1](x)), "a dense layer is not the very same computation"
    assert fast.acceleration.layers[0].dense == 2.0
    assert fast.acceleration.layers[0].sparse == 1.9


@pytest.mark.parametrize("whole", [1.99, 2.5])
def test_a_model_that_is_not_faster_stays_dense(monkeypatch, whole):
    model = pruned(make_mlp())
    give_times(monkeypatch, {**SPARSE_WINS, "accelerated": whole})
    fast = accelerate(model, torch.randn(1, 20))
    assert [type(m) for m in fast.modules()] == [type(m) for m in model.modules()]
    x = torch.randn(5, 20)
    assert torch.equal(fast(x), model(x))
    assert fast.acceleration.accelerated == []
    assert "Left dense" in str(fast.acceleration)
    assert "faster by itself" in str(fast.acceleration)


def test_the_verdict_names_a_dense_baseline_that_is_faster(monkeypatch):
    model, x = pruned(make_mlp()), torch.randn(1, 20)
    give_times(monkeypatch, {**SPARSE_WINS, "bfloat16": 0.5})
    assert "Dense in bfloat16 is 2.00 times as fast as that" in accelerate(model, x).acceleration.verdict
    give_times(monkeypatch, SPARSE_WINS)
    report = accelerate(model, x).acceleration
    assert report.verdict == "Accelerated: 2.00 times as fast as dense."
    assert report.to_dict()["seconds"] == {
        "dense": 2.0,
        "dense, again": 2.0,
        "accelerated": 1.0,
        "dense in bfloat16": 3.0,
    }


def test_what_is_measured_is_right_and_printed(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    model, x = pruned(make_mlp()), torch.randn(4, 20)
    fast = accelerate(model, x, compiled=True, seconds=0.01)
    torch.testing.assert_close(fast(x), model(x), **CLOSE)
    report = fast.acceleration
    compiled = {"dense, compiled", "dense in bfloat16, compiled", "accelerated, compiled"}
    assert compiled | {"dense", "dense, again", "accelerated", "dense in bfloat16"} == set(report.seconds)
    assert all(layer.dense and layer.sparse and layer.rows == (4,) for layer in report.layers)
    assert re.search(r"^2 +Linear +10×30 +4 +\d\d\.\d% +(dense|CSR) +\d", str(report), re.M)
    copied = accelerate(model, x, layers=report.accelerated)
    assert copied.acceleration.accelerated == report.accelerated
    assert copied.acceleration.seconds == {}


class Zoo(nn.ModuleDict):
    """One layer of each kind; none hears of the others."""

    def forward(self, x):
        for name, layer in self.items():
            if isinstance(layer, nn.MultiheadAttention):
                layer(x, x, x)
            elif name != "unused":
                layer(torch.ones(1, 8, 4, 4) if isinstance(layer, nn.Conv2d) else x.to(layer.weight.dtype))
        return x


def test_reasons_to_stay_dense(sparse_wins):
    model = Zoo(
        {
            "narrow": nn.Linear(8, 8).bfloat16(),
            "full": nn.Linear(8, 8),
            "unused": pruned(nn.Linear(8, 8)),
            "hooked": pruned(nn.Linear(8, 8)),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
            "attend": pruned(nn.MultiheadAttention(8, 2)),
            "grouped": pruned(nn.Conv2d(8, 8, 1, groups=2)),
            "reflected": pruned(nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")),
            "same": pruned(nn.Conv2d(8, 8, 3, padding="same")),
            "good": pruned(nn.Linear(8, 8)),
        }
    )
    with torch.no_grad():
        model["masked"] = prune.random_unstructured(nn.Linear(8, 8), "weight", 0.9)
    model["hooked"].register_forward_hook(lambda *_: None)
    report = accelerate(model, torch.randn(1, 8)).acceleration
    assert {layer.name: layer.reason for layer in report.layers} == {
        "narrow": "bfloat16, not float32 or float64",
        "full": "fewer than 50 % zeros",
        "unused": "not called by the example inputs",
        "hooked": "has hooks",
        "masked": "has hooks",
        "normed": "a ParametrizedLinear, which may do more than its base",
        "attend.out_proj": "a NonDynamicallyQuantizableLinear, which may do more than its base",
        "grouped": "grouped, not one matrix",
        "reflected": "padded by more than zeros",
        "same": "padded by more than zeros",
        "good": "",
    }
    assert report.accelerated == ["good"]


def test_without_sparse_kernels_all_stays_dense(monkeypatch, sparse_wins):
    def missing(*_):
        raise RuntimeError("Calling addmm on a sparse CPU tensor requires compiling PyTorch with MKL.\nTrace")

    for function in ("mv", "mm", "addmv", "addmm"):
        monkeypatch.setattr(torch, function, missing)
    report = accelerate(pruned(make_mlp()), torch.randn(1, 20)).acceleration
    assert report.accelerated == []
    reason = "no sparse kernel here: Calling addmm on a sparse CPU tensor requires compiling PyTorch with MKL."
    assert {layer.reason for layer in report.layers} == {reason}


def test_a_kernel_that_gives_something_else_is_not_used(monkeypatch, sparse_wins):
    addmv = torch.addmv
    monkeypatch.setattr(torch, "addmv", lambda *args: addmv(*args) + 0.01)
    fast = accelerate(pruned(make_mlp()), torch.randn(1, 20))
    assert [layer.reason for layer in fast.acceleration.layers] == [
        "the sparse kernel gives something else",
        "",  # has no bias
        "the sparse kernel gives something else",
    ]


def test_shared_layers_and_tied_weights_stay_so(sparse_wins):
    model = pruned(Tied())
    fast = accelerate(model, torch.randn(2, 1, 6, 6))
    assert isinstance(fast.mix, CSRLinear)
    assert fast.mix is fast.again
    assert fast.embed.weight is not model.embed.weight
    torch.testing.assert_close(fast.head.weight, fast.embed.weight, rtol=0, atol=0)


def test_a_layer_alone_is_a_model(sparse_wins):
    layer = pruned(nn.Linear(20, 8))
    fast = accelerate(layer, {"input": torch.randn(3, 20)})
    assert isinstance(fast, CSRLinear)
    assert fast.acceleration.accelerated == [""]


def test_state_dicts_are_those_of_the_dense_model(sparse_wins, tmp_path):
    one, other = pruned(make_convolutions()).eval(), pruned(make_convolutions(), 0.6).eval()
    x = torch.randn(2, 4, 6, 6)
    fast = accelerate(one, x)
    torch.testing.assert_close(fast.state_dict(), one.state_dict(), rtol=0, atol=0)
    assert list(fast.state_dict()) == list(one.state_dict())
    torch.save(other.state_dict(), tmp_path / "other.pt")
    fast.load_state_dict(torch.load(tmp_path / "other.pt"))
    torch.testing.assert_close(fast(x), other(x), **CLOSE)
    one.load_state_dict(fast.state_dict())
    assert torch.equal(one(x), other(x))


def test_packed_files_are_loaded_into_it(sparse_wins, tmp_path):
    one, other = pruned(make_mlp()), pruned(make_mlp())
    x = torch.randn(2, 20)
    fast = accelerate(one, x)
    save_sparse(other, tmp_path / "other.safetensors")
    load_sparse(tmp_path / "other.safetensors", fast)
    torch.testing.assert_close(fast(x), other(x), **CLOSE)


def test_state_dicts_that_do_not_fit_are_refused(sparse_wins):
    fast = accelerate(pruned(make_mlp()), torch.randn(1, 20))
    state = fast.state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.weight"):
        fast.load_state_dict({key: value for key, value in state.items() if key != "0.weight"})
    with pytest.raises(RuntimeError, match=r"size mismatch for 2\.weight: expected \(10, 30\), but got \(5, 30\)"):
        fast.load_state_dict({**state, "2.weight": torch.ones(5, 30)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*0\.crow"):
        fast.load_state_dict({**state, "0.crow": torch.ones(3)})


def test_saved_whole_and_copied(sparse_wins, tmp_path):
    model, x = pruned(make_convolutions()), torch.randn(2, 4, 6, 6)
    fast = accelerate(model, x)
    torch.save(fast, tmp_path / "fast.pt")
    for other in (torch.load(tmp_path / "fast.pt", weights_only=False), copy.deepcopy(fast)):
        assert torch.equal(other(x), fast(x))
        assert other.acceleration == fast.acceleration


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MODELS)
def test_compiled_with_the_rest_of_the_model(name, backend, sparse_wins):
    make, shape, _ = MODELS[name]
    fast = accelerate(pruned(make()), torch.randn(1, *shape))
    compiled = torch.compile(fast, fullgraph=True, backend=backend)
    for batch in (1, 3):
        x = torch.randn(batch, *shape)
        torch.testing.assert_close(compiled(x), fast(x), **CLOSE)


@pytest.mark.parametrize("bias", [None, torch.randn(6)])
@pytest.mark.parametrize("columns", [torch.randn(9, 1), torch.randn(9, 4), torch.randn(4, 9).t(), torch.randn(9, 0)])
def test_the_operator_is_what_it_says(bias, columns):
    layer = CSRLinear(pruned(nn.Linear(9, 6)))
    arguments = (layer.crow, layer.col, layer.values, 9, bias, columns)
    torch.library.opcheck(torch.ops.lightning_sparse.csr_matmul.default, arguments)


def test_to_another_type(sparse_wins):
    model, x = pruned(make_mlp()), torch.randn(3, 20)
    fast = accelerate(model, x)
    torch.testing.assert_close(fast.double()(x.double()), model.double()(x.double()))
    with pytest.raises(RuntimeError, match="stay float32 or float64 on the CPU, but got bfloat16 on cpu"):
        fast.bfloat16()(x.bfloat16())
    with pytest.raises(RuntimeError, match="but got float32 on meta"):
        accelerate(model.float(), x).to("meta")(x.to("meta"))


def test_under_autocast(sparse_wins):
    model, x = pruned(make_mlp()), torch.randn(3, 20)
    fast = accelerate(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fast(x).float(), model(x).float(), rtol=0.05, atol=0.02)


def test_wrong_widths_and_types_are_refused():
    layer = CSRLinear(pruned(nn.Linear(20, 7)))
    for wrong in (torch.randn(2, 40), torch.randn(10), torch.randn(2, 20, dtype=torch.float64)):
        with pytest.raises(RuntimeError):
            layer(wrong)


def test_training_is_refused(sparse_wins):
    fast = accelerate(pruned(make_mlp()), torch.randn(1, 20))
    with pytest.raises(RuntimeError, match="stay in evaluation mode"):
        fast.train()
    with pytest.raises(RuntimeError, match="require no gradient"):
        fast(torch.randn(1, 20, requires_grad=True))


def test_what_is_no_model_for_this_is_refused():
    model, x = pruned(make_mlp()), torch.randn(1, 20)
    with pytest.raises(TypeError, match="not to be compiled yet"):
        accelerate(torch.compile(model), x)
    with pytest.raises(ValueError, match=r"on the CPU, but got `0\.weight` on meta"):
        accelerate(copy.deepcopy(model).to("meta"), x)
    with pytest.raises(ValueError, match="'9' is no linear layer or convolution"):
        accelerate(model, x, layers=["9"])
    nn.init.ones_(model[2].weight)
    with pytest.raises(ValueError, match="'2' is fewer than 50 % zeros"):
        accelerate(model, x, layers=["0", "2"])


def test_a_lightning_module_that_was_trained(sparse_wins):
    model = Classifier()
    trainer = fit(model)
    pruned(model)
    x = torch.randn(2, 1, 6, 6)
    fast = accelerate(model, x)
    assert model.trainer is trainer
    assert fast._trainer is None
    assert fast.acceleration.accelerated
    torch.testing.assert_close(fast(x), model.eval()(x), **CLOSE)
    assert fast(x).shape == (2, CLASSES)
