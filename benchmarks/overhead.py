"""Measure what the callback adds to a training step: every strategy, and what people do without it, in one run.

    python benchmarks/overhead.py                                              # ResNet-20 and ResNet-50, everything
    python benchmarks/overhead.py --models resnet20 --methods ST3 --profile    # and where the time goes

Each arm is an ordinary `Trainer.fit` in a process of its own, held by a callback at the start of a batch until it is
its turn: one arm runs at a time, and a step is all that Lightning does from one `on_train_batch_start` to the next.
Every round takes `--steps` steps of each arm, in random order, after one that does not count, because the arm before
has emptied the caches. The table gives medians over the rounds of the ratio to
the dense arm of the same round, their range, and the ratio of the fastest steps, which feels other programs on the
machine least. A second dense arm shows the error of the measurement. What the baselines stand for: `baselines.py`.

Steps are those at full sparsity, after the ramp. GMP takes a new mask every 100 steps only, mostly not seen here.
"""

import argparse
import contextlib
import ctypes
import inspect
import logging
import multiprocessing
import random
import sys
import time
import warnings
from collections import Counter
from functools import wraps
from pathlib import Path
from statistics import median

import lightning as L
import torch
import torch.nn.functional as F
from baselines import BASELINES, SPARSITY
from networks import ResNet50
from tables import publish, table
from torch.utils.data import DataLoader

from lightning_sparse import strategies
from lightning_sparse.engine import weights
from lightning_sparse.engine.account import Account
from lightning_sparse.engine.hooks import TrainingHooks
from lightning_sparse.engine.learner import Learner

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from cifar10 import ResNet20

WARM_UP = 2  # rounds
COMMON = {"sparsity": SPARSITY, "start": 0, "end": 0}  # as far as a strategy has these arguments
SETTINGS = {"GMP": {"end": 1.0, "initial_sparsity": SPARSITY}}  # on the ramp, for its mask is frozen afterwards


# Network, shape of a batch, and the largest ratio that the strategies in GOALS may have.
MODELS = {"resnet20": (ResNet20, (128, 3, 32, 32), 1.03), "resnet50": (ResNet50, (16, 3, 224, 224), 1.02)}
GOALS = ("ST3", "AutoSparse", "RigL")


class Model(L.LightningModule):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)


class Arm:
    """A run in a process of its own that takes steps when it is told to.

    A process, not a thread: threads would share the cores of the machine among their OpenMP teams, and every small
    operation would pay for waking its team up, which it does not in an ordinary run. Do not let other programs run
    meanwhile: threads that spin while they wait for one that does not run wait long.
    """

    def __init__(self, name, args, model):
        self._pipe, end = multiprocessing.Pipe()
        length = (WARM_UP + args.rounds) * (args.steps + 1) + 1
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=train, args=(end, name, model, length, args), daemon=True)
        self._process.start()
        end.close()

    def run(self, steps):
        """Take some steps; return the seconds that each took, and those that the parts of the engine took."""
        self._pipe.send(steps)
        return self.wait()

    def wait(self):
        try:
            return self._pipe.recv()
        except EOFError:
            raise SystemExit("A run has failed; its error stands above.") from None

    def end(self):
        self._pipe.send(0)
        self._process.join()


class Gate(L.Callback):
    """Holds a run at the start of a batch until it may go on."""

    def __init__(self, pipe, profile, wait):
        self.pipe, self.profile, self.wait = pipe, profile, wait
        self.steps = self.taken = 0
        self.start = 0.0

    def on_train_batch_start(self, *_):
        if self.taken == 0:  # what does not count is over
            self.profile.seconds.clear()
            self.wait()
            self.start = time.perf_counter()
        if self.taken == self.steps:
            self.wait()
            self.pipe.send(((time.perf_counter() - self.start) / max(1, self.steps), self.profile.seconds))
            release_memory()
            self.steps, self.taken = self.pipe.recv(), -1
            if not self.steps:
                raise StopIteration  # as if the data were at their end
        self.taken += 1


def release_memory():
    """Return what has been freed to the system, for the arms whose turn it is."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux with glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def train(pipe, name, model, length, args):
    """What the process of an arm does."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    network, shape = MODELS[model][0]().to(memory_format=layout), batch_shape(model, args)
    batch = torch.randn(shape).to(memory_format=layout), torch.randint(10, shape[:1])
    callbacks = BASELINES[name](network) if name in BASELINES else build(name)
    wait = torch.cuda.synchronize if args.accelerator == "cuda" else lambda: None
    trainer = L.Trainer(
        max_epochs=1,
        accelerator=args.accelerator,
        devices=1,
        precision=args.precision,
        callbacks=[Gate(pipe, Profile(args.profile, wait), wait), *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Model(network), DataLoader([batch] * length, batch_size=None))


def batch_shape(model, args):
    size, *image = MODELS[model][1]
    return (args.batch or size, *image)


def build(method):
    """The strategy, or nothing for a dense arm."""
    if method.startswith("dense"):
        return []
    strategy = getattr(strategies, method)
    settings = COMMON | SETTINGS.get(method, {})
    known = inspect.signature(strategy).parameters
    return [strategy(verbose=False, **{key: value for key, value in settings.items() if key in known})]


HOOKS = ("on_train_batch_start", "on_before_optimizer_step", "_after_step", "end_batch")
PARTS = {
    "gradient": [(weights.LatentWeights, "_pull_back")],
    "copies": [(weights, "_copy")],
    "thresholds": [(Learner, "step")],
    "selection": [(weights.LatentWeights, "_select")],
    "projection": [(weights.LatentWeights, "_project")],
    "count": [(weights.LatentWeights, "count")],
    "FLOPs": [(Account, "price")],
    "all": [(TrainingHooks, name) for name in HOOKS],
}


class Profile:
    """Seconds that the parts of the engine have taken."""

    def __init__(self, enabled, wait):
        self.seconds, self.wait = Counter(), wait
        for part, functions in PARTS.items() if enabled else ():
            for owner, name in functions:
                setattr(owner, name, self._timed(getattr(owner, name), part))

    def _timed(self, function, part):
        @wraps(function)
        def timed(*args, **kwargs):
            self.wait()
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.wait()
            self.seconds[part] += time.perf_counter() - start
            return result

        return timed


class Copy:
    """Seconds that reading and writing all targeted weights once takes: what no engine can do without."""

    def __init__(self, model, args):
        self.size = sum(weight.numel() for weight in MODELS[model][0]().parameters() if weight.ndim > 1)
        self.source, self.target = (torch.zeros(self.size, device=args.accelerator) for _ in range(2))
        self.wait = torch.cuda.synchronize if args.accelerator == "cuda" else lambda: None

    def run(self):
        self.target.copy_(self.source)  # wakes the threads up
        self.wait()
        start = time.perf_counter()
        self.target.copy_(self.source)
        self.wait()
        return time.perf_counter() - start


def measure(model, args):
    """Measure one model and return its tables."""
    arms = {name: Arm(name, args, model) for name in ["dense", "dense again", *args.methods]}
    for arm in arms.values():
        arm.wait()
    copy, copies = Copy(model, args), []
    seconds, parts = {name: [] for name in arms}, {name: [] for name in arms}
    for turn in range(WARM_UP + args.rounds):
        time.sleep(0.01)
        copies.append(copy.run())
        for name in random.sample(list(arms), len(arms)):
            time.sleep(0.01)  # until the threads of the arm before have gone to sleep
            taken, profile = arms[name].run(args.steps)
            if turn >= WARM_UP:
                seconds[name].append(taken)
                parts[name].append(profile)
    for arm in arms.values():
        arm.end()
    floor, dense = 1000 * min(copies), 1000 * median(seconds["dense"])
    shape = "×".join(map(str, batch_shape(model, args)))
    text = f"## {model}, batch {shape}, {args.rounds} rounds of {args.steps} step(s)\n\n{times(model, seconds)}"
    text += f"\n\nFloor: to read and write the {copy.size:,} targeted weights once takes {floor:.2f} ms here"
    text += f" ({8e-6 * copy.size / floor:.1f} GB/s), {floor / dense:.2%} of the dense step."
    if args.profile:
        ours = {name: parts[name] for name in args.methods if name not in BASELINES}
        text += f"\n\n{profiles(ours, args.steps, dense, floor)}"
    return text


def times(model, seconds):
    """Table of the steps."""
    rows = []
    for name, values in seconds.items():
        ratios = [value / dense for value, dense in zip(values, seconds["dense"], strict=True)]
        span = f"{min(ratios):.3f} – {max(ratios):.3f}"
        fastest = f"{min(values) / min(seconds['dense']):.3f}"
        goal = f"≤ {MODELS[model][2]}" if name in GOALS else ""
        rows.append([name, f"{1000 * median(values):.1f}", f"{median(ratios):.3f}", span, fastest, goal])
    return table(["method", "median ms", "median ratio", "min – max", "ratio of fastest", "goal"], rows)


def profiles(parts, steps, dense, floor):
    """Table of what the engine's part of a step consists of."""
    rows = []
    for name, rounds in parts.items():
        figures = [1000 * median(part[title] for part in rounds) / steps for title in PARTS]
        cells = [f"{figure:.2f}" for figure in figures]
        rows.append([name, *cells, f"{figures[-1] / dense:.1%}", f"{figures[-1] / floor:.1f}"])
    return table(["ms per step in", *PARTS, "all : dense", "all : floor"], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    methods = [*strategies.__all__, *BASELINES]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=1, help="steps of each arm in a round")
    parser.add_argument("--batch", type=int, help="images in a batch")
    parser.add_argument("--accelerator", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="32-true", help="of the Trainer, such as bf16-mixed")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--profile", action="store_true", help="also say where the time of the callback goes")
    parser.add_argument("--output", help="markdown file to write the tables to")
    args = parser.parse_args()
    publish("What a training step costs", "\n\n".join(measure(model, args) for model in args.models), args.output)


if __name__ == "__main__":
    main()
