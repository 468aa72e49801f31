"""Measure the memory that every strategy needs beyond that of dense training, and whether it grows.

    python benchmarks/memory.py
    python benchmarks/memory.py --methods ST3 --width 4096

Each run trains an MLP of three equal square layers in a process of its own. The first table gives the highest resident
memory of the process beyond that of the dense run, and the memory that it holds between two steps, both in bytes per
targeted weight. A dense copy in float32 is 4 bytes, a mask of single bits 1/8 byte. The second table gives all memory
in these units, gradients included, where the optimizer keeps its state in full or with `compact_optimizer_state`.

glibc is told to return to the system at once what has been freed (`MALLOC_MMAP_THRESHOLD_`, `MALLOC_ARENA_MAX`), so
that resident memory is what the tensors take. Linux only.
"""

import argparse
import functools
import gc
import inspect
import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import lightning as L
import torch
from baselines import BASELINES, SPARSITY
from tables import publish, table
from torch import nn
from torch.utils.data import DataLoader

from lightning_sparse import strategies

LAYERS = 3
COMMON = {"sparsity": SPARSITY, "start": 0, "end": 0}
SETTINGS = {"GMP": {"end": 1.0, "initial_sparsity": SPARSITY, "update_every_n_steps": 1}}
GOAL = 4 + 1 / 8  # a dense copy and a bit
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
OPTIMIZERS = {"SGD": functools.partial(torch.optim.SGD, momentum=0.9), "AdamW": torch.optim.AdamW}
STEPS = (20, 200)  # before which resident memory is read
FITS = (1, 5, 10)


class Model(L.LightningModule):
    def __init__(self, width, optimizer="SGD"):
        super().__init__()
        self.make_optimizer = OPTIMIZERS[optimizer]
        self.network = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(LAYERS)))

    def training_step(self, batch, batch_idx):
        return self.network(batch).square().mean()

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters(), lr=0.01)


class Watch(L.Callback):
    """Reads the resident memory at the start of some batches."""

    def __init__(self):
        self.resident = {}

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step in STEPS:
            self.resident[trainer.global_step] = resident()


def resident(field="VmRSS"):
    """Bytes in memory now, or with `VmHWM` at most so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def train(method, width, steps, fits, optimizer="SGD", compact=False):
    """Train in this process and return its memory: highest, after some steps of the first fit, after some fits."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.simplefilter("ignore")
    model, watch, after = Model(width, optimizer), Watch(), {}
    callbacks = BASELINES[method](model.network) if method in BASELINES else build(method, compact)
    for fit in range(1, fits + 1):
        batches = torch.randn(steps if fit == 1 else 3, 1, width)
        trainer = L.Trainer(
            max_epochs=1,
            accelerator="cpu",
            callbacks=[watch, *callbacks],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, DataLoader(batches, batch_size=None))
        if fit in FITS:
            gc.collect()  # what a Trainer leaves behind refers to itself
            after[fit] = resident()
    return {"peak": resident("VmHWM"), "steps": watch.resident, "fits": after}


def build(method, compact):
    if method == "dense":
        return []
    strategy = getattr(strategies, method)
    settings = COMMON | SETTINGS.get(method, {})
    known = inspect.signature(strategy).parameters
    known = {key: value for key, value in settings.items() if key in known}
    return [strategy(verbose=False, **known, **({"compact_optimizer_state": True} if compact else {}))]


def run(*arguments):
    """`train` in a process of its own."""
    command = [sys.executable, __file__, "--run", *map(str, arguments)]
    result = subprocess.run(command, env=os.environ | MALLOC, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def extra(methods, width):
    """Table of the memory beyond that of a dense run."""
    dense, rows = per_weight("dense", width), []
    for method in methods:
        beyond = [f"{own - base:.2f}" for own, base in zip(per_weight(method, width), dense, strict=True)]
        rows.append([method, *beyond, "" if method in BASELINES else f"≤ {GOAL:.2f}"])
    return table(["bytes per targeted weight", "between steps", "at most", "goal"], rows)


def fixed(width):
    """Table of all memory under a mask that stays as it is, by what the optimizer keeps."""
    rows = []
    for optimizer in OPTIMIZERS:
        for kept, compact in (("full", ""), ("compact", "compact")):
            found = per_weight("StaticSparsity", width, optimizer, compact)
            rows.append([f"{optimizer}, {kept} state", *(f"{each:.2f}" for each in found)])
    return table(["bytes per targeted weight", "between steps", "at most"], rows)


def per_weight(method, width, *settings):
    """Bytes per weight between steps and at most: of two widths, so that what is constant falls out."""
    step, small = str(STEPS[0]), width // 4
    large, little = (run(method, each, STEPS[0] + 1, 1, *settings) for each in (width, small))
    weights = LAYERS * (width**2 - small**2)
    return (large["steps"][step] - little["steps"][step]) / weights, (large["peak"] - little["peak"]) / weights


def growth(methods, width):
    """Table of the memory after many steps and many fits, beyond that after the first few."""
    rows = []
    for method in ["dense", *methods]:
        found = run(method, width, STEPS[1] + 1, FITS[-1])
        steps, fits = found["steps"], found["fits"]
        grown = [steps[str(STEPS[1])] - steps[str(STEPS[0])], *(fits[str(fit)] - fits["1"] for fit in FITS[1:])]
        rows.append([method, *(f"{bytes / 2**20:+.1f}" for bytes in grown)])
    titles = ["MB more", f"step {STEPS[1]} than {STEPS[0]}", *(f"fit {fit} than 1" for fit in FITS[1:])]
    return table(titles, rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    methods = [*strategies.__all__, *BASELINES]
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.add_argument("--width", type=int, default=2048, help="of the layers of the first table")
    parser.add_argument("--output", help="markdown file to write the tables to")
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        method, width, steps, fits, *settings = args.run
        print(json.dumps(train(method, int(width), int(steps), int(fits), *settings)))
        return
    text = f"Beyond dense training of {LAYERS} × {args.width}² weights with SGD and momentum:\n\n"
    text += f"{extra(args.methods, args.width)}\n\n"
    text += f"All of it, at {SPARSITY:.0%} sparsity under a mask that stays as it is,"
    text += " with `compact_optimizer_state` and without; while an optimizer steps, its state is full:\n\n"
    text += f"{fixed(args.width)}\n\nOver time, {LAYERS} × {args.width // 4}² weights"
    text += f" ({4 * LAYERS * (args.width // 4) ** 2 / 2**20:.0f} MB):\n\n{growth(args.methods, args.width // 4)}"
    publish("What training needs in memory", text, args.output)


if __name__ == "__main__":
    main()
