"""Law 5: ranks agree bit for bit; replicated, sharded and split weights end like those of one process."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_sparse import consolidate_checkpoint
from lightning_sparse.reports import read_run
from tests.helpers.assertions import assert_same
from tests.helpers.models import Loader, make_trainer
from tests.helpers.ranks import SpreadClassifier, held, keep, spawn, train
from tests.helpers.strategies import SETTINGS

# Ten weights in a layer that is hardly needed.
pytestmark = pytest.mark.filterwarnings("ignore:`OptG` has pruned all")
RESUMED = ("ST3", "AutoSparse", "GMP", "SparseTraining-masked")
slow = pytest.mark.slow
sizes = pytest.mark.parametrize("size", [2, pytest.param(4, marks=slow)], scope="module")


def train_all(folder: Path) -> None:
    """Called on every rank: each strategy in each layout, saving on the way, then each checkpoint in each layout."""
    size = torch.distributed.get_world_size()
    layouts = ["ddp", "fsdp", "fsdp-sharded"] + ["fsdp-tp"] * (size > 2)
    for name in SETTINGS:
        for layout in layouts:
            record = folder / f"{name}-{layout}.jsonl" if name in RESUMED else None
            end = train(name, layout, save=folder / f"{name}-{layout}.ckpt", record=record)
            keep(end, folder / f"{name}-{layout}")
    for name in RESUMED:
        for layout in layouts[:3]:
            for source in ["one", *layouts[:3]]:
                if layout != "ddp" or source != "fsdp-sharded":
                    end = train(name, layout, resume=folder / f"{name}-{source}.ckpt")
                    keep(end, folder / f"{name}-{source}-{layout}")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, size):
    """What a group of processes and a single one hold after training each strategy."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in SETTINGS:
        torch.save(train(name, "one", save=folder / f"{name}-one.ckpt"), folder / f"{name}-one")
    spawn(train_all, size, folder)
    return folder


def load(folder, *parts):
    return torch.load(folder / "-".join(parts))


def assert_alike(actual, expected):
    """Equal but for the order in which gradients are added up."""
    for name, mask in expected["masks"].items():
        assert torch.equal(actual["masks"][name], mask)
    for key in ("weights", "latents", "thresholds"):
        torch.testing.assert_close(actual[key], expected[key], rtol=1e-5, atol=1e-6)


@sizes
@pytest.mark.parametrize("name", SETTINGS)
def test_replicated_and_sharded_weights_end_alike(trained, size, name):
    one, ddp, fsdp = (load(trained, name, layout) for layout in ("one", "ddp", "fsdp"))
    assert ddp.pop("compared") == size * one.pop("compared") > 0
    assert_alike(ddp, one)
    assert ddp["metrics"] == pytest.approx(one["metrics"])
    # Two numbers add up in one way only; but how a power is rounded depends on where in memory it is taken.
    if size == 2 and getattr(SETTINGS[name].build(), "power", 1.0) == 1.0:
        assert_same({**fsdp, "compared": 0}, {**ddp, "compared": 0})
    assert_alike(fsdp, one)
    assert fsdp["metrics"] == pytest.approx(one["metrics"])


@slow
@pytest.mark.parametrize("size", [4], scope="module")
@pytest.mark.parametrize("name", SETTINGS)
def test_weights_split_in_two_directions_end_alike(trained, name):
    assert_alike(load(trained, name, "fsdp", "tp"), load(trained, name, "one"))


@sizes
@pytest.mark.parametrize("name", RESUMED)
def test_a_checkpoint_resumes_in_every_layout(trained, size, name):
    for layout in ("ddp", "fsdp", "fsdp-sharded"):
        uninterrupted = load(trained, name, layout)
        for source in ("one", "ddp", "fsdp", "fsdp-sharded"):
            if layout == "ddp" and source == "fsdp-sharded":
                continue
            resumed = load(trained, name, source, layout)
            if size == 2 and source != "one":
                assert_same({**resumed, "compared": 0}, {**uninterrupted, "compared": 0})
            assert_alike(resumed, uninterrupted)


@sizes
@pytest.mark.parametrize("name", RESUMED)
def test_a_checkpoint_of_many_ranks_resumes_in_one_process(trained, size, name, tmp_path):
    consolidate_checkpoint(trained / f"{name}-fsdp-sharded.ckpt", tmp_path / "whole.ckpt")
    paths = [trained / f"{name}-{layout}.ckpt" for layout in ("ddp", "fsdp")] + [tmp_path / "whole.ckpt"]
    for path in paths:
        record = tmp_path / f"{path.stem}.jsonl"
        assert_alike(train(name, "one", resume=path, record=record), load(trained, name, "one"))


@sizes
@pytest.mark.parametrize("name", RESUMED)
def test_ranks_record_what_one_process_does(trained, size, name, tmp_path):
    train(name, "one", record=tmp_path / "one.jsonl")
    one = read_run(tmp_path / "one.jsonl")
    for layout in ("ddp", "fsdp"):
        run = read_run(trained / f"{name}-{layout}.jsonl")  # written by the first rank
        assert (run.methods, run.weights, run.epochs) == (one.methods, one.weights, one.epochs)
        assert_same([run.masks(epoch) for epoch in run.epochs], [one.masks(epoch) for epoch in run.epochs])
        for key in ("zeros", "dead", "grown", "dropped"):
            assert [record[key] for record in run.records] == [record[key] for record in one.records]
        for key in ("thresholds", "training"):
            assert run.table(key) == pytest.approx(one.table(key), nan_ok=True)


class Straying(Callback):
    """Changes the latents of one weight on one rank."""

    def __init__(self, sparse):
        self.sparse = sparse

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_rank == 1:
            self.sparse.latent("net.4.weight").neg_().add_(0.01)


def stray():
    callback = SETTINGS["TopKGradientAnnealing"].build()
    trainer = make_trainer(Straying(callback), callback, strategy="ddp", devices=2)
    with pytest.raises(RuntimeError, match=r"^The ranks hold different masks or thresholds of `net\.4\.weight`"):
        trainer.fit(SpreadClassifier(), Loader(), Loader())


def test_ranks_that_no_longer_agree_are_told_so():
    spawn(stray, 2)


class LooksBefore(SpreadClassifier):
    """Runs forward before training begins, as the model summary does with an ``example_input_array``."""

    def on_fit_start(self):
        with torch.no_grad():
            self(torch.zeros(1, 1, 6, 6))


def fit_after_a_forward(folder):
    results = []
    for model in (SpreadClassifier(), LooksBefore()):
        callback = SETTINGS["ST3"].build()
        strategy = ModelParallelStrategy(2, 1)
        make_trainer(callback, strategy=strategy, devices=2).fit(model, Loader(), Loader())
        results.append({**held(model, callback), "metrics": callback.metrics()})
    keep(results, folder / "results")


def test_sharded_weights_that_a_forward_has_gathered_train_alike(tmp_path):
    spawn(fit_after_a_forward, 2, tmp_path)
    plain, looked = torch.load(tmp_path / "results")
    assert_same(looked, plain)
