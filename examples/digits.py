"""Train a small network on 1,797 handwritten digits: dense, with ST-3 and with AutoSparse, from one seed.

    python examples/digits.py --output runs/digits
    python examples/digits.py --method STR --method GMP     # or any other strategy of the package

Every run writes its logs (CSV and TensorBoard) and its best checkpoint to `<output>/<method>/version_<n>`. A table and
`<output>/digits.png` compare the runs, `<output>/report.html` shows masks, thresholds and FLOPs of each layer;
`tensorboard --logdir <output>` shows the curves.
"""

import argparse
import csv
import io
import logging
import statistics
import time
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparse import RunRecorder, SparseModelCheckpoint, strategies
from lightning_sparse.flops import count_flops
from lightning_sparse.functional import sparsity
from lightning_sparse.reports import read_run, write_report

# Settings for a run of 320 steps. A strategy that is not listed runs with its defaults.
OFTEN = {"sparsity": 0.9, "update_every_n_steps": 10}
SETTINGS = {
    "AutoSparse": {"threshold_init": -5.0, "threshold_weight_decay": 0.015},
    "DSR": OFTEN,
    "GMP": OFTEN,
    "GraNet": OFTEN,
    "IterativeMagnitudePruning": {"sparsity": 0.9, "rounds": 2},
    "LAMP": OFTEN,
    "LATS": {"threshold": 0.05},
    "MEST": OFTEN,
    "Powerpropagation": OFTEN,
    "RigL": OFTEN,
    "SET": OFTEN,
    "SNFS": OFTEN,
    "ST3": {"sparsity": 0.9},
    "SparseVariationalDropout": {"kl_weight": 1e-3, "log_variance_init": -6.0, "log_variance_lr": 0.02},
    "STR": {"threshold_init": -5.0, "threshold_weight_decay": 0.015},
    "TopKAST": OFTEN,
    "TopKGradientAnnealing": {"sparsity": 0.9},
}
# Sparsity of a model that may be the best, where the pattern or so few steps lead to less than is asked of the others.
LEAST = {"SSTE": 0.45, "SparseVariationalDropout": 0.6}
COLORS = ["#000000", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"]  # Okabe and Ito


class Digits(L.LightningModule):
    """Four convolutions and a linear layer. Nothing in here knows about sparsity."""

    def __init__(self, width=32, lr=0.03):
        super().__init__()
        self.save_hyperparameters()

        def conv(inputs, outputs):
            layers = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
            return nn.Sequential(*layers)

        self.conv1, self.conv2 = conv(1, width), conv(width, width)
        self.conv3, self.conv4 = conv(width, 2 * width), conv(2 * width, 2 * width)
        self.head = nn.Linear(8 * width, 10)

    def forward(self, images):
        x = F.max_pool2d(self.conv2(self.conv1(images)), 2)
        x = F.max_pool2d(self.conv4(self.conv3(x)), 2)
        return self.head(x.flatten(1))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        logits = self(images)
        self.log("val_loss", F.cross_entropy(logits, labels))
        self.log("val_accuracy", (logits.argmax(1) == labels).float().mean(), prog_bar=True)

    def test_step(self, batch, batch_idx):
        images, labels = batch
        self.log("test_accuracy", (self(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), self.hparams.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class StepTimer(Callback):
    """Seconds of each training step, from the start of a batch to the start of the next one in the same epoch."""

    def __init__(self):
        self.seconds, self.start = [], 0.0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        now = time.perf_counter()
        if batch_idx:
            self.seconds.append(now - self.start)
        self.start = now


def load_data():
    """Loaders of 997 training, 300 validation and 500 test images, the same images in every run."""
    images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 16
    rest, test = train_test_split(range(len(labels)), test_size=500, stratify=labels, random_state=0)
    train, val = train_test_split(rest, test_size=300, stratify=labels[rest], random_state=0)
    train, val, test = (TensorDataset(images[part], labels[part]) for part in (train, val, test))
    return DataLoader(train, batch_size=64, shuffle=True), DataLoader(val, batch_size=300), DataLoader(test, 500)


def pruned(path, amount=0.9):
    """The model of a checkpoint without its smallest weights, for a method that keeps the zeros it finds."""
    model = Digits.load_from_checkpoint(path)
    weights = [(module, "weight") for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    prune.global_unstructured(weights, prune.L1Unstructured, amount=amount)
    for module, weight in weights:
        prune.remove(module, weight)
    return model


def run(name, args, dense=None):
    """Train with one method, load its best checkpoint back, and return what the table and the picture show."""
    L.seed_everything(args.seed, verbose=False)
    train, val, test = load_data()
    methods = [] if name == "dense" else [getattr(strategies, name)(**SETTINGS.get(name, {}))]
    best = SparseModelCheckpoint(monitor="val_loss", min_sparsity=min(args.min_sparsity, LEAST.get(name, 1.0)))
    timer, log = StepTimer(), CSVLogger(args.output, name)
    trainer = L.Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        callbacks=[*methods, best, timer, RunRecorder(), TQDMProgressBar(refresh_rate=8)],
        logger=[log, TensorBoardLogger(args.output, name, log.version)],
        log_every_n_steps=5,
        enable_model_summary=False,
    )
    model = pruned(dense["checkpoint"]) if name == "KeepMask" else Digits()
    trainer.fit(model, train, val)
    if not best.best_model_path:
        raise SystemExit(f"{name} did not become sparse enough. Train for more --epochs or lower --min-sparsity.")

    # From here on nothing needs the callback: the checkpoint holds ordinary weights, many of them zero.
    model = Digits.load_from_checkpoint(best.best_model_path)
    plain = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    weights = {key.split(".")[0]: weight for key, weight in model.named_parameters() if weight.ndim > 1}
    flops = count_flops(model, torch.zeros(1, 1, 8, 8))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return {
        "accuracy": plain.test(model, test, verbose=False)[0]["test_accuracy"],
        "val_accuracy": plain.validate(model, val, verbose=False)[0]["val_accuracy"],
        "sparsity": sparsity(weights.values()),
        "inference": flops.sparse / flops.dense,
        "training": float(trainer.callback_metrics.get("flops/training_ratio", 1.0)),
        "seconds": statistics.quantiles(timer.seconds, n=10)[0],  # of an undisturbed step: other programs run, too
        "checkpoint": Path(best.best_model_path),
        "zipped": len(zlib.compress(file.getvalue(), 9)),
        "layers": {layer: sparsity([weight]) for layer, weight in weights.items()},
        "log": Path(log.log_dir, "metrics.csv"),
        "record": replace(read_run(log.log_dir), name=name),
    }


def history(log, key):
    """What was logged, by epoch."""
    with log.open() as file:
        return {int(row["epoch"]): float(row[key]) for row in csv.DictReader(file) if row.get(key)}


def show(results):
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("method", overflow="fold")
    titles = "test accuracy|sparsity|inference FLOPs|training FLOPs|time per step|ckpt file|weights zipped"
    dense = results["dense"]["seconds"]
    for title in titles.split("|"):
        table.add_column(title.replace(" ", "\n", 1), justify="right")
    for name, result in results.items():
        cells = [f"{result[key]:.1%}" for key in ("accuracy", "sparsity", "inference", "training")]
        cells += [f"{result['seconds'] / dense:.2f} ×"]
        cells += [f"{size / 1000:.0f} kB" for size in (result["checkpoint"].stat().st_size, result["zipped"])]
        table.add_row(name, *cells)
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"\nFLOPs (theoretical) and time are relative to dense, where a step takes {1000 * dense:.1f} ms.\n"
        "The checkpoint holds all that resuming needs, such as the dense latents and the\n"
        "optimizer; zipped is what the weights alone take, compressed.\n\n"
        "Loaded back without the callback (in brackets what was logged in training):"
    )
    for name, result in results.items():
        epoch = torch.load(result["checkpoint"], weights_only=True)["epoch"]
        accuracy, zeros = (history(result["log"], key).get(epoch, 0.0) for key in ("val_accuracy", "sparsity/total"))
        console.print(
            f"  {name}: validation accuracy {result['val_accuracy']:.2%} ({accuracy:.2%}),"
            f" sparsity {result['sparsity']:.4%} ({zeros:.4%})\n    {result['checkpoint']}",
            soft_wrap=True,
        )


def draw(results, path):
    figure = Figure(figsize=(12, 4), layout="constrained")
    accuracy, zeros, layers = figure.subplots(1, 3)
    for i, (name, result) in enumerate(results.items()):
        style = {"color": COLORS[i % len(COLORS)], "label": name}
        for axes, key in ((accuracy, "val_accuracy"), (zeros, "sparsity/total")):
            points = {epoch + 1: 100 * value for epoch, value in history(result["log"], key).items()}
            axes.plot(points.keys(), points.values(), marker="os^Dv<>"[i % 7], markersize=4, **style)
        if name != "dense":
            height = 0.8 / (len(results) - 1)
            rows = [row + (i - 0.5) * height for row in range(len(result["layers"]))]
            layers.barh(rows, [100 * s for s in result["layers"].values()], height, **style)
    accuracy.set(xlabel="epoch", ylabel="validation accuracy [%]", ylim=(90, 100.2))
    zeros.set(xlabel="epoch", ylabel="sparsity [%]", ylim=(-2, 102))
    layers.set(xlabel="sparsity of the best model [%]", xlim=(0, 102))
    layers.set_yticks([row + 0.4 for row in range(len(result["layers"]))], result["layers"])
    layers.invert_yaxis()
    for axes in (accuracy, zeros, layers):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside upper center", ncols=len(results), frameon=False)
    figure.savefig(path, dpi=150)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/digits", type=Path)
    parser.add_argument("--method", action="append", choices=strategies.__all__, help="may be repeated")
    parser.add_argument("--epochs", default=20, type=int)
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--min-sparsity", default=0.8, type=float, help="what a model needs to compete for the best")
    args = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*LeafSpec|.*does not have many workers")
    torch.set_num_threads(1)  # the tensors are tiny
    results = {"dense": run("dense", args)}
    results |= {name: run(name, args, results["dense"]) for name in args.method or ["ST3", "AutoSparse"]}
    show(results)
    draw(results, args.output / "digits.png")
    write_report([result["record"] for result in results.values()], args.output / "report.html")


if __name__ == "__main__":
    main()
