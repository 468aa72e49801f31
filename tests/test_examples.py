"""The programs under examples/ and benchmarks/ on a tiny budget."""

import argparse
import csv
import importlib.util
import io
import logging
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_sparse import strategies
from tests.helpers.models import make_trainer
from tests.helpers.side_by_side import TOLERANCE, Net, distance, make_data

ROOT = Path(__file__).parents[1]


def load(name, folder="examples"):
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.fixture(scope="module")
def cifar10():
    return load("cifar10")


@pytest.fixture(autouse=True)
def quiet():
    """The examples silence Lightning for good; give it its voice back."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    yield
    logger.setLevel(level)


def logged(path, key):
    with path.open() as file:
        return {int(row["epoch"]): float(row[key]) for row in csv.DictReader(file) if row.get(key)}


def test_digits_writes_what_it_promises(digits, capsys, monkeypatch):
    digits.main(["--output", "out", "--epochs", "2", "--min-sparsity", "0"])

    lines = capsys.readouterr().out.splitlines()
    for method in ("dense", "ST3", "AutoSparse"):
        assert [line for line in lines if line.startswith(f"{method} ") and "%" in line and "kB" in line], method
        assert list(Path("out", method, "version_0").glob("events.out.tfevents*"))
    page = Path("out/report.html").read_text("utf-8")
    assert "<title>dense and ST3 and AutoSparse</title>" in page
    with Image.open("out/digits.png") as picture:
        assert picture.width >= 1000
        assert len(picture.convert("L").getcolors()) > 50  # not an empty sheet

    # What is in the checkpoint is what was logged, and reading it takes neither the callback nor the package.
    for name in [name for name in sys.modules if name.partition(".")[0] == "lightning_sparse"]:
        monkeypatch.setitem(sys.modules, name, None)
    _, val, _ = digits.load_data()
    for method in ("ST3", "AutoSparse"):
        version = Path("out", method, "version_0")
        [path] = version.glob("checkpoints/*.ckpt")
        model = digits.Digits.load_from_checkpoint(path).eval()
        epoch = torch.load(path, weights_only=True)["epoch"]
        weights = [p for p in model.parameters() if p.ndim > 1]
        zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
        images, labels = next(iter(val))
        accuracy = (model(images).argmax(1) == labels).float().mean().item()
        assert zeros == pytest.approx(logged(version / "metrics.csv", "sparsity/total")[epoch], abs=1e-7)
        assert zeros > (0.89 if method == "ST3" else 0.0)
        assert accuracy == pytest.approx(logged(version / "metrics.csv", "val_accuracy")[epoch], abs=1e-6)


def options(epochs, min_sparsity=0.0):
    return argparse.Namespace(output="out", epochs=epochs, seed=0, min_sparsity=min_sparsity)


QUICK = ["KeepMask", "RigL", "STR"]  # a start from a sparse model, masks that change, learned thresholds


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in strategies.__all__]
)
def test_digits_takes_any_strategy(digits, method):
    dense = digits.run("dense", options(epochs=1)) if method == "KeepMask" else None
    result = digits.run(method, options(epochs=2), dense)
    assert 0.0 < result["sparsity"] < 1.0
    assert result["inference"] < 1.0


def test_digits_has_settings_for_strategies_only(digits):
    assert digits.SETTINGS.keys() <= {*strategies.__all__}
    for name, settings in digits.SETTINGS.items():
        vars(strategies)[name](**settings)


def test_digits_says_so_if_no_model_is_sparse_enough(digits):
    with pytest.raises(SystemExit, match="STR did not become sparse enough"):
        digits.run("STR", options(epochs=1, min_sparsity=0.99))


# -- CIFAR-10 ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def data():
    """Smooth random images, which JPEG hardly alters, as train and test split."""
    random = np.random.default_rng(0)
    splits = {}
    for split, count in (("train", 40), ("test", 10)):
        small = random.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
        images = np.stack([np.asarray(Image.fromarray(image).resize((32, 32), Image.BICUBIC)) for image in small])
        splits[split] = images, random.integers(0, 10, count)
    return splits


@pytest.fixture
def archive(data):
    arrays = {}
    for split, (images, labels) in data.items():
        files = []
        for image in images:
            file = io.BytesIO()
            Image.fromarray(image).save(file, "jpeg", quality=95)
            files.append(file.getvalue())
        arrays[f"{split}_jpeg"] = np.frombuffer(b"".join(files), np.uint8)
        arrays[f"{split}_length"] = np.array([len(file) for file in files], np.uint32)
        arrays[f"{split}_label"] = labels.astype(np.uint8)
    np.savez("cifar10_jpeg.npz", **arrays)
    return Path("cifar10_jpeg.npz")


@pytest.fixture
def release(data):
    folder = Path("cifar-10-batches-py")
    folder.mkdir()
    images, labels = data["train"]
    parts = {f"data_batch_{i + 1}": (images[8 * i : 8 * i + 8], labels[8 * i : 8 * i + 8]) for i in range(5)}
    for name, (images, labels) in {**parts, "test_batch": data["test"]}.items():
        batch = {b"data": images.transpose(0, 3, 1, 2).reshape(-1, 3072), b"labels": labels.tolist()}
        old = pickle.dumps(batch, protocol=3).replace(b"cnumpy._core.", b"cnumpy.core.")  # where NumPy was in 2009
        Path(folder, name).write_bytes(old)
    Path(folder, "batches.meta").write_bytes(pickle.dumps({b"label_names": []}))
    return folder


@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar10_reads_both_forms(cifar10, data, archive, release, split):
    expected, classes = data[split]
    for read, path, error in ((cifar10.read_jpegs, archive, 8), (cifar10.read_release, release, 0)):
        images, labels = read(path, split)
        assert images.dtype == torch.uint8
        assert np.abs(images.numpy().astype(int) - expected).mean() <= error
        assert labels.tolist() == classes.tolist()


def test_cifar10_runs_no_code_from_pickles(cifar10, release):
    class Attack:
        def __reduce__(self):
            return Path.touch, (Path("attacked"),)

    Path(release, "test_batch").write_bytes(pickle.dumps({b"data": Attack()}))
    with pytest.raises(pickle.UnpicklingError, match="no need of"):
        cifar10.read_release(release, "test")
    assert not Path("attacked").exists()


def test_cifar10_shifts_and_flips(cifar10, data):
    images = np.concatenate([data["train"][0]] * 4)
    seen = set()
    for image, result in zip(images, cifar10.shift_and_flip(torch.from_numpy(images)).numpy(), strict=True):
        padded = np.pad(image, ((4, 4), (4, 4), (0, 0)), mode="edge")
        matches = [
            (y, x, flip)
            for y in range(9)
            for x in range(9)
            for flip in (1, -1)
            if np.array_equal(padded[y : y + 32, x : x + 32][:, ::flip], result)
        ]
        assert len(matches) == 1
        seen.update(matches)
    ys, xs, flips = zip(*seen, strict=True)
    assert len(set(ys)) == len(set(xs)) == 9
    assert set(flips) == {1, -1}


@pytest.mark.parametrize("method", ["ST3", "GMP"])
def test_cifar10_trains_by_the_recipe(cifar10, release, monkeypatch, method):
    monkeypatch.setenv("CIFAR10_JPEG", str(release))
    short = [
        "--trainer.max_epochs=2",
        "--trainer.callbacks.start=0",
        "--trainer.callbacks.end=1",
        "--data.batch_size=8",
    ]
    quiet = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    strategy = [f"--trainer.callbacks.class_path={method}", "--trainer.callbacks.verbose=false"]
    if method == "ST3":
        strategy.append("--trainer.callbacks.freeze=1")
    config = ["--config", str(ROOT / "examples/cifar10.yaml")]
    monkeypatch.setattr(sys, "argv", ["cifar10.py", "fit", *config, *strategy, *short, *quiet])
    cli = cifar10.main()

    [callback] = [c for c in cli.trainer.callbacks if isinstance(c, getattr(strategies, method))]
    assert callback.sparsity == pytest.approx(0.9, abs=1e-3)
    assert callback.targets == [name for name, p in cli.model.named_parameters() if p.ndim > 1]
    assert cli.trainer.global_step == 8  # 36 of 40 images, in batches of 8
    assert {p.dtype for p in cli.model.parameters()} == {torch.float32}
    restored = cifar10.Classifier.load_from_checkpoint(cli.trainer.checkpoint_callback.best_model_path)
    weights = [p for p in restored.parameters() if p.ndim > 1]
    assert sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights) == pytest.approx(0.9, abs=1e-3)


def test_cifar10_asks_for_its_data(cifar10, monkeypatch):
    monkeypatch.delenv("CIFAR10_JPEG", raising=False)
    with pytest.raises(FileNotFoundError, match="CIFAR10_JPEG, but got None"):
        cifar10.Cifar10().setup("fit")
    with pytest.raises(FileNotFoundError, match="but got 'nowhere'"):
        cifar10.Cifar10("nowhere").setup("fit")


# -- benchmarks -------------------------------------------------------------------------------------------------------


def benchmark(name, output, *arguments):
    """The tables that a benchmark prints; the file that it writes must hold them, too."""
    command = [sys.executable, ROOT / "benchmarks" / name, *arguments, "--output", output]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed.strip() in output.read_text()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]


@pytest.fixture(scope="module")
def baselines():
    return load("baselines", "benchmarks")


def configure_plainly(thetas):
    optimizer = torch.optim.SGD(thetas.values(), lr=0.02, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)


def train_plain_net(make_callbacks):
    """The weights that a small network shows after 20 steps."""
    torch.manual_seed(0)
    net = Net(configure_plainly)
    make_trainer(*make_callbacks(net), max_epochs=2).fit(net, make_data())
    return [layer.weight.detach() for layer in (net.stem, net.depthwise, net.grouped, net.head)]


def test_the_baseline_that_sorts_is_st3(baselines, monkeypatch):
    monkeypatch.setattr(baselines, "SPARSITY", 0.6)
    ours = train_plain_net(lambda net: [strategies.ST3(0.6, start=0, end=0, verbose=False)])
    theirs = train_plain_net(baselines.full_sort)
    assert max(distance(a, b) for a, b in zip(ours, theirs, strict=True)) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("name", ["full-sort", "parametrize", "ModelPruning"])
def test_baselines_hold_their_sparsity(baselines, name):
    weights = train_plain_net(baselines.BASELINES[name])
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    # ModelPruning prunes one of 504 weights more in every step.
    assert zeros / sum(weight.numel() for weight in weights) == pytest.approx(baselines.SPARSITY, abs=0.06)


@pytest.mark.slow
def test_overhead_prints_its_tables(tmp_path):
    methods = ["ST3", "full-sort", "autograd", "parametrize", "ModelPruning"]
    arguments = ["--models", "resnet20", "--methods", *methods, "--rounds", "1", "--batch", "2", "--profile"]
    rows = benchmark("overhead.py", tmp_path / "overhead.md", *arguments)
    assert [row[0] for row in rows] == [
        *["method", "---", "dense", "dense again", *methods],
        *["ms per step in", "---", "ST3"],
    ]
    assert float(rows[-1][-3]) > 0  # the profile has seen the engine at work


@pytest.mark.slow
def test_memory_finds_the_dense_copy_and_no_growth(tmp_path):
    rows = benchmark("memory.py", tmp_path / "memory.md", "--methods", "ST3", "--width", "2048")
    between, highest = map(float, rows[2][1:3])
    assert between == pytest.approx(4, abs=0.5)  # one copy in float32
    assert highest > between - 0.5
    *_, grown = rows
    assert all(float(cell) < 10 for cell in grown[1:])  # MB, of 12 MB weights that are copied in every fit


@pytest.mark.slow
def test_selection_reduces_as_much_for_every_number_of_ranks(tmp_path):
    arguments = ["--sizes", "100000", "--weights", "4000000", "--ranks", "1", "4"]
    rows = benchmark("selection.py", tmp_path / "selection.md", *arguments)
    assert rows[2][0] == "100,000"
    one, four = rows[-2:]
    assert one[:2] == ["1", "4,000,000"]
    assert four[:2] == ["4", "1,000,000"]
    assert one[2] == four[2] == "2 × 524,296 B"


def test_accuracy_goes_on_where_it_stopped(archive, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    accuracy = load("accuracy", "benchmarks")
    monkeypatch.setattr(sys, "argv", ["accuracy.py"])
    monkeypatch.setitem(accuracy.ARGUMENTS, "GMP", {"start": 0.0, "end": 0.5, "update_every_n_steps": 1})
    trained, train = [], accuracy.train
    monkeypatch.setattr(accuracy, "train", lambda *run: trained.append(run[:3]) or train(*run))
    small = [
        "--data",
        str(archive),
        "--batch",
        "12",
        "--epochs",
        "1",
        "--lr",
        "0.1",
        "--threads",
        "1",
        "--lines",
        "lines",
    ]

    def run(*arguments):
        trained.clear()
        accuracy.main([*small, *arguments])
        return trained

    assert run("--methods", "dense", "GMP", "--sparsities", "0.9") == [("dense", 0.0, 0), ("GMP", 0.9, 0)]
    dense, gmp = lines = accuracy.read(Path("lines"))
    assert dense["inference_flops_ratio"] == dense["training_flops_ratio"] == 1.0
    assert gmp["sparsity_counted"] == pytest.approx(0.9, abs=1e-3)
    assert gmp["inference_flops_ratio"] == pytest.approx(0.1, abs=1e-2)
    assert 0.1 < gmp["training_flops_ratio"] < 1.0
    for line in lines:
        assert line["test_accuracy"] * 10 == pytest.approx(round(line["test_accuracy"] * 10))  # of 10 images
        assert line["val_accuracy"] * 4 == pytest.approx(round(line["val_accuracy"] * 4))

    # Only what is new trains: another seed of one of the two methods, then another recipe.
    both = ["--methods", "dense", "GMP", "--sparsities", "0.9"]
    assert run(*both) == []
    assert run(*both, "--seeds", "0", "1", "--methods", "GMP") == [("GMP", 0.9, 1)]
    assert run("--methods", "dense", "--lr", "0.2") == [("dense", 0.0, 0)]

    capsys.readouterr()
    assert run("--show", "--data", "nowhere", "--output", "out.md") == []
    printed = capsys.readouterr().out.strip()
    assert printed in Path("out.md").read_text()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("| ")]
    assert [(row[0], row[1], row[8]) for row in cells if row[0] in ("dense", "GMP")] == [
        *[("dense", "0%", "1"), ("GMP", "90%", "2")],
        ("dense", "0%", "1"),  # by the other recipe
    ]
    with Image.open("out.png") as picture:
        assert picture.width >= 1000
        assert len(picture.convert("L").getcolors()) > 50
