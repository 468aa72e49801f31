"""What other programs load is what the model is: outputs, zeros, types; what is not right is not kept."""

import copy

import onnx
import onnxruntime
import openvino
import pytest
import torch
from torch import nn

from lightning_sparse.export import (
    flush_subnormals,
    handover,
    to_onnx,
    to_openvino,
    to_program,
    to_safetensors,
    to_state_dict,
)

RUNTIMES = {to_onnx: "m.onnx", to_openvino: "m.xml", to_program: "m.pt2"}
WRITERS = {**RUNTIMES, to_safetensors: "m.safetensors", to_state_dict: "m.pt"}


def make_model():
    """With zeros, subnormal numbers, a batch norm to fold and two inputs."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6)
            self.head = nn.Linear(24, 5)

        def forward(self, images, scale):
            return self.head(self.norm(self.conv(images)).relu().flatten(1)) * scale, images.mean()

    model = Two()
    with torch.no_grad():
        model.norm.running_var.uniform_(0.5, 2.0)
        model.conv.weight[:, :, 0] = 0.0
        model.head.weight[torch.rand(5, 24) < 0.5] = 0.0
        model.head.weight[0, :3] = torch.tensor([1e-40, -1e-39, 2e-38])
    return model


EXAMPLE = (torch.linspace(-1, 1, 32).reshape(2, 1, 4, 4), torch.tensor([[2.0], [3.0]]))


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_reports_what_the_file_holds(tmp_path, write):
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    path = tmp_path / WRITERS[write]
    result = write(model, EXAMPLE, path)
    zeros = sum(int((p == 0).sum()) for p in (model.conv.weight, model.head.weight)) + 2
    assert (result.zeros, result.zeros_in_file, result.subnormals) == (zeros, zeros, 2)
    assert result.difference < 1e-5
    assert result.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert {file.stem for file in tmp_path.iterdir()} == {"m"}  # nothing else is left
    assert str(zeros) in str(result)
    assert result.to_dict()["path"] == str(path)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_other_programs_run_it(tmp_path):
    """Without any function of this package, for a batch of another size."""
    model, batch = make_model().eval(), (torch.randn(7, 1, 4, 4), torch.rand(7, 1))
    for write, name in RUNTIMES.items():
        write(model, tuple(example[:1] for example in EXAMPLE), tmp_path / name, dynamic_batch=True)
    expected = model(*batch)[0].detach()
    feed = dict(zip(("images", "scale"), (tensor.numpy() for tensor in batch), strict=True))
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    torch.testing.assert_close(torch.from_numpy(session.run(None, feed)[0]), expected)
    onnx.checker.check_model(str(tmp_path / "m.onnx"))
    compiled = openvino.compile_model(str(tmp_path / "m.xml"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    torch.testing.assert_close(torch.from_numpy(compiled(feed)[0]), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.export.load(tmp_path / "m.pt2").module()(*batch)[0], expected)


@pytest.mark.parametrize("write", [to_safetensors, to_state_dict, to_program], ids=lambda write: write.__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_keeps_the_type(tmp_path, write, dtype):
    model = make_model().to(dtype)
    result = write(model, tuple(example.to(dtype) for example in EXAMPLE), tmp_path / WRITERS[write])
    assert result.difference <= 128 * torch.finfo(dtype).eps
    if write is to_state_dict:
        assert torch.load(tmp_path / "m.pt")["head.weight"].dtype == dtype


def test_keyword_arguments_and_tied_weights(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    with torch.no_grad():
        model[0].weight[0] = 0.0
    for write, name in WRITERS.items():
        result = write(model, {"input": torch.randn(3, 4)}, tmp_path / name)
        assert result.zeros == result.zeros_in_file == 4


def spoil(monkeypatch, change):
    """What is read back is another model."""
    emptied = handover._emptied

    def other(model):
        return change(emptied(model))

    monkeypatch.setattr(handover, "_emptied", other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.register_forward_hook(lambda *a: (a[2][0] * 1.01, a[2][1])) and m, "but they differ by .* It was"),
        (lambda m: m.register_forward_hook(lambda *a: (a[2][0] * torch.nan, a[2][1])) and m, "they differ by inf"),
        (lambda m: nn.Linear(1, 1), "can be written to m.pt and run from there, but got: Error"),
    ],
)
def test_a_file_that_is_wrong_is_not_kept(tmp_path, monkeypatch, change, message):
    path = tmp_path / "m.pt"
    path.write_text("what was there before")
    spoil(monkeypatch, change)
    with pytest.raises(ValueError, match=message):
        to_state_dict(make_model(), EXAMPLE, path)
    assert [file.name for file in tmp_path.iterdir()] == ["m.pt"]
    assert path.read_text() == "what was there before"


def test_lost_zeros_are_noticed(tmp_path, monkeypatch):
    """Outputs may agree although zeros have become small numbers."""
    load = torch.load

    def almost(*args, **kwargs):
        return {name: tensor + 1e-12 * (tensor == 0) for name, tensor in load(*args, **kwargs).items()}

    monkeypatch.setattr(torch, "load", almost)
    with pytest.raises(ValueError, match=r"Expected m.pt to hold the \d+ zeros of the model, but got 0\."):
        to_state_dict(make_model(), EXAMPLE, tmp_path / "m.pt")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_refused(tmp_path):
    class Branches(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    for write, name in RUNTIMES.items():
        with pytest.raises(ValueError, match="Expected a model that can be written to m"):
            write(Branches(3, 3), torch.randn(2, 3), tmp_path / name)
    with pytest.raises(ValueError, match=r"Expected argument `path` to end with .xml, but got 'm.bin'"):
        to_openvino(nn.Linear(2, 2), torch.randn(1, 2), "m.bin")
    assert not list(tmp_path.iterdir())


def test_a_batch_that_cannot_vary_is_refused(tmp_path):
    class Fixed(nn.Linear):
        def forward(self, x):
            return super().forward(x.reshape(4, 3)) * x.reshape(-1, 3).sum()

    with pytest.raises(ValueError, match=r"Expected a model that can be written|invalid for input of size"):
        to_program(Fixed(3, 3), torch.randn(4, 3), tmp_path / "m.pt2", dynamic_batch=True)


@pytest.mark.parametrize(
    ("package", "write", "extra"),
    [
        ("onnx", to_onnx, "lightning-sparse.onnx."),
        ("openvino", to_openvino, "lightning-sparse.openvino."),
        ("safetensors.torch", to_safetensors, "safetensors"),
    ],
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, package, write, extra):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=f"pip install '{extra}'"):
        write(nn.Linear(2, 2), torch.randn(1, 2), tmp_path / WRITERS[write])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_flushes_what_is_subnormal_and_nothing_else(dtype):
    tiny = torch.finfo(dtype).tiny
    numbers = torch.tensor([1.0, 0.0, tiny, -tiny, tiny / 2, -tiny / 2, torch.nan, -torch.inf], dtype=dtype)
    expected = torch.tensor([1.0, 0.0, tiny, -tiny, 0.0, 0.0, torch.nan, -torch.inf], dtype=dtype)
    torch.testing.assert_close(flush_subnormals(numbers), expected, rtol=0, atol=0, equal_nan=True)
    assert numbers[4] != 0


def test_flushes_states_and_models():
    model = make_model()
    model.norm.eval()
    model.head.register_buffer("more", torch.tensor([1e-40, 1.0]))
    model.again = model.head
    flushed = flush_subnormals(model.state_dict())
    assert flushed["again.weight"] is flushed["head.weight"]
    assert flushed["norm.num_batches_tracked"].dtype == torch.int64
    assert flushed["head.weight"][0, :3].tolist() == [0.0, 0.0, pytest.approx(2e-38)]
    other = flush_subnormals(model)
    assert other.training
    assert not other.norm.training
    assert other.head.more.tolist() == [0.0, 1.0]
    assert model.head.more[0] != 0
    assert int((other.head.weight == 0).sum()) == int((model.head.weight == 0).sum()) + 2
