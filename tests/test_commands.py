"""The commands that take a trained model: what they print and write is what the functions behind them do."""

import subprocess
import sys
from pathlib import Path

import lightning as L
import onnxruntime
import pytest
import torch

from lightning_sparse import GMP, RunRecorder
from lightning_sparse import __main__ as program
from lightning_sparse.export import load_sparse, save_sparse
from tests.helpers.models import Classifier, fit

MODEL = """
import lightning as L, torch
from torch import nn

class Model(L.LightningModule):
    def __init__(self, width: int = 6):
        super().__init__()
        self.save_hyperparameters()
        self.body, self.head = nn.Linear(4, width), nn.Linear(width, 2)
        if width == 6:
            self.example_input_array = torch.ones(1, 4)

    def forward(self, x):
        return self.head(self.body(x).relu())

    def training_step(self, batch, batch_idx):
        return self(torch.ones(2, 4)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)
"""


@pytest.fixture(params=["checkpoint", "packed", "state dict"])
def trained(request, monkeypatch):
    """A model with two dead channels and a file of it, in an empty folder."""
    Path("mine.py").write_text(MODEL)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    sys.modules.pop("mine", None)
    import mine

    width = 10 if request.param == "checkpoint" else 6  # a checkpoint holds the arguments of its model
    model = mine.Model(width)
    with torch.no_grad():
        model.body.weight[:2] = 0.0
        model.body.bias[:2] = -1.0
    if request.param == "checkpoint":
        trainer = L.Trainer(max_epochs=0, logger=False, enable_progress_bar=False)
        trainer.fit(model, [0])
        trainer.save_checkpoint("file")
    elif request.param == "packed":
        save_sparse(model, "file")
    else:
        torch.save(model.state_dict(), "file")
    return model.eval()


def run(*arguments):
    program.main([*arguments, "--input_shape=[1,4]"] if "mine.Model" in arguments else list(arguments))


def test_exports_to_another_program(trained, capsys):
    run("export", "file", "mine.Model", "out.onnx", "--dynamic_batch=true")
    assert "out.onnx: " in capsys.readouterr().out
    session, x = onnxruntime.InferenceSession("out.onnx"), torch.randn(3, 4)
    [found] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), trained(x).detach())


def test_exports_a_packed_file(trained):
    run("export", "file", "mine.Model", "out.zst")
    restored = load_sparse("out.zst")
    assert restored.keys() == trained.state_dict().keys()
    assert all(torch.equal(tensor, restored[name]) for name, tensor in trained.state_dict().items())


def test_slims_and_writes_the_smaller_network(trained, capsys):
    run("slim", "file", "mine.Model", "--output=slim.pt2")
    width = trained.body.out_features
    assert f"{width}×4" in (printed := capsys.readouterr().out)
    assert f"{width - 2}×4" in printed
    x = torch.ones(1, 4)
    torch.testing.assert_close(torch.export.load("slim.pt2").module()(x), trained(x))


def test_accelerates_and_writes_the_module(trained, capsys):
    run("accelerate", "file", "mine.Model", "--output=fast.pt")
    assert "fewer than" in capsys.readouterr().out
    x = torch.randn(1, 4)
    torch.testing.assert_close(torch.load("fast.pt", weights_only=False)(x), trained(x))


def test_explains_every_layer(trained, capsys):
    run("explain", "file", "mine.Model")
    assert "body" in (printed := capsys.readouterr().out)
    assert "head" in printed


def test_reports_on_a_run(capsys):
    for name, callbacks in (("sparse", [GMP(verbose=False)]), ("dense", [])):
        fit(Classifier(), *callbacks, RunRecorder(f"{name}.jsonl"))
    program.main(["report", "sparse.jsonl", "--against=dense.jsonl", "--output=page.html", "--pictures=pictures"])
    assert capsys.readouterr().out == "page.html\n"
    page = Path("page.html").read_text()
    assert "sparse" in page
    assert "dense" in page
    assert len(list(Path("pictures").glob("*.png"))) > 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "nowhere", "mine.Model", "m.onnx"], "nowhere"),
        (["export", "file", "mine.Other", "m.onnx"], "to be a class like my_package.Model, but got 'mine.Other'"),
        (["export", "file", "mine.torch", "m.onnx"], "to name a class of modules"),
        (["export", "file", "mine.Model", "m.tflite"], "to end in one of .onnx, .pt, .pt2, .safetensors, .xml, but"),
        (["slim", "file", "mine.Model", "--output=m.pt"], "to end in one of .onnx, .pt2, .xml, but"),
        (["explain", "other", "mine.Model"], "Expected other to fit the model `mine.Model`"),
        (["report", "file"], "file"),
    ],
)
@pytest.mark.parametrize("trained", ["state dict"], indirect=True)
def test_mistakes_end_in_a_message(trained, capsys, arguments, message):
    torch.save({"weight": torch.ones(2)}, "other")
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_asks_for_the_shape_of_the_input(capsys, monkeypatch):
    Path("bare.py").write_text(MODEL.replace("width == 6", "False"))
    monkeypatch.syspath_prepend(str(Path.cwd()))
    command = [sys.executable, "-m", "lightning_sparse", "explain", "file", "bare.Model"]
    import bare

    torch.save(bare.Model().state_dict(), "file")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "`bare.Model` has no `example_input_array`" in done.stderr
    assert "Traceback" not in done.stderr
