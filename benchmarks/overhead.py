"""Measure what the callback adds to a training step: every strategy beside the dense step, in one run.

    python benchmarks/overhead.py                                              # ResNet-20 and ResNet-50, all strategies
    python benchmarks/overhead.py --models resnet20 --methods ST3 --profile    # and where the time goes

Each arm is an ordinary `Trainer.fit` in a thread of its own, held by a callback at the start of every batch until it is
its turn: one arm runs at a time, and a step is all that Lightning does from one `on_train_batch_start` to the next.
Every round takes `--steps` steps of each arm, in random order. The table gives medians over the rounds of the ratio to
the dense arm of the same round, their range, and the ratio of the fastest steps, which feels other programs on the
machine least. A second dense arm shows the error of the measurement.

Steps are those at full sparsity, after the ramp. GMP takes a new mask every 100 steps only, mostly not seen here.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: arms that wait must not spin

import argparse
import contextlib
import ctypes
import inspect
import logging
import random
import sys
import threading
import time
import warnings
from collections import Counter
from functools import wraps
from pathlib import Path
from statistics import median

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from transformers import ResNetConfig, ResNetForImageClassification

from lightning_sparse import strategies
from lightning_sparse.engine import weights
from lightning_sparse.engine.account import Account
from lightning_sparse.engine.hooks import TrainingHooks
from lightning_sparse.engine.learner import Learner

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from cifar10 import ResNet20

GOAL = 1.05  # of ST-3
WARM_UP = 4  # rounds
COMMON = {"sparsity": 0.9, "start": 0, "end": 0, "verbose": False}  # as far as a strategy has these arguments
SETTINGS = {"GMP": {"end": 1.0, "initial_sparsity": 0.9}}  # on the ramp, for its mask is frozen afterwards


class ResNet50(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = ResNetForImageClassification(ResNetConfig(num_labels=1000))

    def forward(self, images):
        return self.network(images).logits


# Network, and shape of a batch.
MODELS = {"resnet20": (ResNet20, (128, 3, 32, 32)), "resnet50": (ResNet50, (16, 3, 224, 224))}


class Model(L.LightningModule):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)


class Arm(L.Callback):
    """A run that takes a step when it is told to."""

    def __init__(self, method, network, batch, steps):
        self._go, self._ready, self._ended = threading.Semaphore(0), threading.Semaphore(0), False
        torch.manual_seed(0)
        trainer = L.Trainer(
            max_epochs=1,
            accelerator="cpu",
            callbacks=[self, *build(method)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader = DataLoader([batch] * (steps + 1), batch_size=None)
        self._thread = threading.Thread(target=self._fit, args=(trainer, Model(network()), loader), daemon=True)
        self._thread.start()
        self._ready.acquire()

    def _fit(self, trainer, model, loader):
        try:
            trainer.fit(model, loader)
        finally:
            self._ended = True
            self._ready.release()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._ready.release()
        self._go.acquire()
        if self._ended:
            raise StopIteration  # as if the data were at their end

    def run(self, steps):
        """Take some steps and return the seconds that each took."""
        start = time.perf_counter()
        for _ in range(steps):
            self._go.release()
            self._ready.acquire()
        if self._ended:
            raise SystemExit("A run has failed; its error stands above.")
        return (time.perf_counter() - start) / steps

    def end(self):
        self._ended = True
        self._go.release()
        self._thread.join()


def build(method):
    """The strategy, or nothing for a dense arm."""
    if method.startswith("dense"):
        return []
    strategy = getattr(strategies, method)
    settings = COMMON | SETTINGS.get(method, {})
    return [strategy(**{key: settings[key] for key in inspect.signature(strategy).parameters if key in settings})]


class Profile:
    """Seconds that the parts of the engine have taken since the last `clear`."""

    def __init__(self):
        self.seconds = Counter()
        self.clear = self.seconds.clear
        self.parts = {
            "gradient": (weights.LatentWeights, "_pull_back"),
            "copies": (weights, "_copy"),
            "thresholds": (Learner, "step"),
            "selection": (weights.LatentWeights, "_select"),
            "projection": (weights.LatentWeights, "_project"),
            "count": (weights.LatentWeights, "count"),
            "FLOPs": (Account, "price"),
        }
        for part, (owner, name) in self.parts.items():
            self._watch(owner, name, part)
        for name in ("on_train_batch_start", "on_before_optimizer_step", "_after_step", "end_batch"):
            self._watch(TrainingHooks, name, "all")

    def _watch(self, owner, name, part):
        function = getattr(owner, name)

        @wraps(function)
        def timed(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[part] += time.perf_counter() - start
            return result

        setattr(owner, name, timed)


def measure(model, methods, rounds, steps, profile):
    """Measure one model and print its tables."""
    network, shape = MODELS[model]
    batch = torch.randn(shape), torch.randint(10, shape[:1])
    arms = {name: Arm(name, network, batch, (WARM_UP + rounds) * steps) for name in ["dense", "dense again", *methods]}
    seconds, parts = {name: [] for name in arms}, {name: [] for name in arms}
    for turn in range(WARM_UP + rounds):
        for name in random.sample(list(arms), len(arms)):
            if profile:
                profile.clear()
            taken = arms[name].run(steps)
            if turn >= WARM_UP:
                seconds[name].append(taken)
                parts[name].append(Counter(profile.seconds) if profile else {})
    for arm in arms.values():
        arm.end()
    print(f"\n{model}, batch {'×'.join(map(str, shape))}, {rounds} rounds of {steps} step(s)\n")
    print("| method | median ms | median ratio | min – max | ratio of fastest | goal |\n|---|---|---|---|---|---|")
    for name, values in seconds.items():
        ratios = [value / dense for value, dense in zip(values, seconds["dense"], strict=True)]
        cells = f"{1000 * median(values):.1f} | {median(ratios):.3f} | {min(ratios):.3f} – {max(ratios):.3f}"
        fastest = min(values) / min(seconds["dense"])
        print(f"| {name} | {cells} | {fastest:.3f} | {f'≤ {GOAL}' if name == 'ST3' else ''} |")
    if profile:
        titles = [*profile.parts, "all"]
        print(f"\n| ms per step in | {' | '.join(titles)} | all : dense |\n|---|{'---|' * len(titles)}---|")
        for name in methods:
            figures = [1000 * median(part[title] for part in parts[name]) / steps for title in titles]
            share = figures[-1] / 1000 / median(seconds["dense"])
            print(f"| {name} | {' | '.join(f'{figure:.2f}' for figure in figures)} | {share:.1%} |")


def share_memory():
    """Let all arms reuse the memory that one has freed. By default threads each get their own, fresh and slow."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux with glibc
        ctypes.CDLL("libc.so.6").mallopt(-8, 1)  # M_ARENA_MAX


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=strategies.__all__, default=strategies.__all__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=1, help="steps of each arm in a round")
    parser.add_argument("--profile", action="store_true", help="also say where the time of the callback goes")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.simplefilter("ignore")
    share_memory()
    profile = Profile() if args.profile else None
    for model in args.models:
        measure(model, args.methods, args.rounds, args.steps, profile)


if __name__ == "__main__":
    main()
