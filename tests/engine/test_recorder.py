"""What is recorded is what the model held; a run that is resumed leaves the record of one that never stopped."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

from lightning_sparse import SET, ST3, RunRecorder
from lightning_sparse.engine.watch import dead_outputs
from lightning_sparse.reports import read_run
from tests.helpers.models import Classifier, Loader, ResumableLoader, Saver, fit, make_trainer
from tests.helpers.strategies import SETTINGS, every_strategy

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*has pruned all:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]


class Follow(Callback):
    """Looks at the model when training begins and when epochs end."""

    def __init__(self, *methods):
        self.methods, self.moments, self.overlap = methods, [], []

    def on_train_start(self, trainer, pl_module):
        self.look(pl_module)

    def on_train_epoch_end(self, trainer, pl_module):
        self.look(pl_module)

    def look(self, module):
        self.moments.append(
            {
                name: (method.mask(name).clone(), module.get_parameter(name).detach().clone(), method.threshold(name))
                for method in self.methods
                for name in method.targets
            }
        )


def assert_seen(run, moments):
    """Masks bit for bit, and all numbers by plain counting."""
    assert run.epochs == list(range(len(moments)))
    before = {name: torch.zeros_like(mask) for name, (mask, _, _) in moments[0].items()}
    for epoch, moment in enumerate(moments):
        record, masks = run.records[epoch], run.masks(epoch)
        assert run.names == list(masks) == list(moment)
        for i, (name, (mask, weight, threshold)) in enumerate(moment.items()):
            assert torch.equal(masks[name], mask)
            assert record["zeros"][i] == int((weight == 0).sum())
            assert record["thresholds"][i] == threshold
            assert record["grown"][i] == int((mask & ~before[name]).sum())
            assert record["dropped"][i] == int((~mask & before[name]).sum())
            assert run.weights[i]["shape"] == list(mask.shape)
        before = masks


@every_strategy
def test_what_is_recorded_is_what_the_model_held(setting):
    method = setting.build(log_layers=True)
    # The strategies step behind `follow`, which therefore sees an epoch's end before they choose for the next.
    follow, model = Follow(method), Classifier()
    trainer = fit(model, RunRecorder("run.jsonl"), method, follow, max_epochs=4)
    run = read_run("run.jsonl")
    assert_seen(run, follow.moments)
    assert run.methods[0]["name"] == type(method).__name__
    assert {key: run.methods[0]["arguments"][key] for key in setting.kwargs if key in ("start", "end")} == {
        key: value for key, value in setting.kwargs.items() if key in ("start", "end")
    }
    last = run.records[-1]
    assert last["metrics"]["val_loss"] == float(trainer.callback_metrics["val_loss"])
    assert not [name for name in run.metrics if name.startswith(("sparsity/layer", "threshold", "dead", "mask"))]
    assert {name: last["metrics"][name] for name in method.metrics() if name in last["metrics"]} == {
        name: value for name, value in method.metrics().items() if name in last["metrics"]
    }
    assert run.total_sparsity[4] == pytest.approx(method.sparsity)
    # Overlaps are those that the engine has warned by; dead outputs, too.
    assert run.overlap[-1].tolist() == pytest.approx([method._watch.overlap[name] for name in run.names])
    assert last["dead"] == [row.dead_outputs for row in method.report().rows if row.treated]
    assert [weight["outputs"] for weight in run.weights] == [
        dead_outputs(method.mask(name), *method._watch._outputs[name])[1] for name in run.names
    ]
    # The parts add up to what was spent.
    dense = run.flops
    shares = dict(zip(run.names, last["training"], strict=True))
    spent = sum(3 * flops * shares.get(name, 1.0) for name, flops in dense.items()) * 4 * len(Loader().batches) * 6
    assert spent == pytest.approx(last["metrics"]["flops/training_total"])


def test_several_callbacks_and_none():
    first, second = ST3(0.5, end=1, targets=["net.0"], verbose=False), SET(0.8, targets=["net.6"], verbose=False)
    follow = Follow(first, second)
    fit(Classifier(), second, RunRecorder("both.jsonl"), first, follow)
    run = read_run("both.jsonl")
    assert_seen(run, [{name: moment[name] for name in run.names} for moment in follow.moments])
    assert {method["name"] for method in run.methods} == {"ST3", "SET"}

    fit(Classifier(), RunRecorder("dense.jsonl"))
    run = read_run("dense.jsonl")
    assert (run.methods, run.weights, run.masks()) == ([], [], {})
    assert list(run.curve("val_loss")) == [1, 2, 3]


def test_metrics_are_recorded_when_they_are_news():
    fit(Classifier(), RunRecorder("run.jsonl"), max_epochs=6, check_val_every_n_epoch=2)
    assert list(read_run("run.jsonl").curve("val_loss")) == [2, 4, 6]


def test_the_file_lies_beside_the_logs_by_default():
    fit(Classifier(), RunRecorder(), default_root_dir="here")
    assert read_run("here").epochs == [0, 1, 2, 3]
    for _ in range(2):
        trainer = fit(Classifier(), RunRecorder(), logger=CSVLogger("logs", "name"), max_epochs=1)
        assert Path(trainer.log_dir, "run.jsonl").exists()
    assert [read_run(f"logs/name/version_{i}").epochs for i in range(2)] == [[0, 1], [0, 1]]


def record(path, method, *callbacks, **kwargs):
    fit(Classifier(), RunRecorder(path), SETTINGS[method].build(), *callbacks, max_epochs=3, **kwargs)
    return read_run(path)


class StopHereError(Exception):
    pass


class Interrupt(Callback):
    """Raises in the second epoch."""

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 6:
            raise StopHereError


@pytest.mark.parametrize("method", ["AutoSparse", "SET"])
@pytest.mark.parametrize("place", ["the same file", "another file", "another machine"])
def test_a_resumed_run_goes_on_in_its_record(method, place):
    expected = record("uninterrupted.jsonl", method)
    with pytest.raises(StopHereError):
        record("run.jsonl", method, Saver(), Interrupt())
    assert read_run("run.jsonl").epochs == [0, 1]
    if place == "another machine":
        Path("run.jsonl").unlink()
    path = "run.jsonl" if place == "the same file" else "more.jsonl"
    for checkpoint in ("step=3", "step=4", "epoch=0", "step=5"):
        run = record(path, method, ckpt_path=f"{checkpoint}.ckpt")
        assert run.epochs == ([0, 1, 2, 3] if place != "another machine" else run.epochs)
        assert len(set(run.epochs)) == len(run.epochs)
        assert run.records[-1]["training"] == pytest.approx(expected.records[-1]["training"])
        for epoch in run.epochs[1 if place == "another machine" else 0 :]:
            masks = expected.masks(epoch)
            assert all(torch.equal(mask, masks[name]) for name, mask in run.masks(epoch).items())
        if place != "another machine":
            assert run.records == expected.records
        else:
            Path(path).unlink()


def test_what_is_done_again_is_recorded_once():
    whole = record("run.jsonl", "SET", Saver())
    lines = Path("run.jsonl").read_text().splitlines(keepends=True)
    # A crash between the last batch of an epoch and its end, which a resumed run does not come to any more.
    Path("run.jsonl").write_text("".join(lines[:2]))
    run = record("run.jsonl", "SET", ckpt_path="step=4.ckpt")
    assert run.epochs == [0, 1, 2, 3]
    assert [run.records[1][key] for key in ("step", "masks", "dead")] == [
        whole.records[1][key] for key in ("step", "masks", "dead")
    ]
    # A file that is ahead of the checkpoint.
    callback, trainer = SETTINGS["SET"].build(), make_trainer(RunRecorder("run.jsonl"), max_epochs=2)
    trainer.callbacks.append(callback)
    trainer.fit(Classifier(), ResumableLoader(seed=3), Loader(seed=1, batches=1), ckpt_path="step=6.ckpt")
    assert read_run("run.jsonl").epochs == [0, 1, 2]
    assert read_run("run.jsonl").records[2]["metrics"] != whole.records[2]["metrics"]


def test_a_run_that_starts_anew_replaces_its_record_but_no_other_file():
    first = record("run.jsonl", "SET")
    assert record("run.jsonl", "SET").records == first.records
    Path("notes.txt").write_text("of great value\n")
    with pytest.raises(
        ValueError, match=r"^Expected argument `path` to be a new file or that of a run, but got 'notes"
    ):
        record("notes.txt", "SET")
    assert Path("notes.txt").read_text() == "of great value\n"


def test_a_second_fit_goes_on():
    callback, model = SETTINGS["SET"].build(), Classifier()
    trainer = make_trainer(RunRecorder("run.jsonl"), callback, max_epochs=2)
    trainer.fit(model, Loader(), Loader(batches=1))
    trainer.fit_loop.max_epochs = 4
    trainer.fit(model, Loader(), Loader(batches=1))
    assert read_run("run.jsonl").epochs == [0, 1, 2, 3, 4]


def test_the_record_holds_no_weights():
    model = Classifier()
    fit(model, RunRecorder("run.jsonl"), SETTINGS["SET"].build())
    record = json.loads(Path("run.jsonl").read_text().splitlines()[-1])
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert len(json.dumps(record)) < 4 * numbers  # less than a byte each would have held
