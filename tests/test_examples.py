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

ROOT = Path(__file__).parents[1]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
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


@pytest.mark.parametrize("method", [name for name in strategies.__all__ if name not in ("ST3", "AutoSparse")])
def test_digits_takes_any_strategy(digits, method, capsys):
    result = digits.run(method, argparse.Namespace(output="out", epochs=2, seed=0, min_sparsity=0.0))
    assert 0.0 < result["sparsity"] < 1.0
    assert result["inference"] < 1.0


def test_digits_says_so_if_no_model_is_sparse_enough(digits):
    with pytest.raises(SystemExit, match="STR did not become sparse enough"):
        digits.run("STR", argparse.Namespace(output="out", epochs=1, seed=0, min_sparsity=0.99))


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


# -- benchmark --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_overhead_prints_its_tables():
    command = [sys.executable, ROOT / "benchmarks/overhead.py", "--models", "resnet20", "--methods", "ST3"]
    output = subprocess.run([*command, "--rounds", "1", "--profile"], check=True, capture_output=True, text=True).stdout
    rows = [line.split("|")[1].strip() for line in output.splitlines() if line.startswith("|")]
    assert rows == ["method", "---", "dense", "dense again", "ST3", "ms per step in", "---", "ST3"]
