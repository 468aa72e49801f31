"""Measure how long exact selection takes, from a million weights to billions, on one process and as one of many ranks.

    python benchmarks/selection.py
    python benchmarks/selection.py --sizes 1000000 --weights 10000000 --ranks 1 4

The first table takes a quantile over layers of 16 million weights, as ST-3 does at every step (cold, and warm
with the threshold of the step before as a guess), and `topk_masks`, beside what sorts or partitions all magnitudes.

The second table plays rank 0 of a model whose weights are split over ranks: DTensors on a process group that
communicates nothing. The sum of the counters over the ranks is simulated by as many times the own ones, so that every
rank is taken to hold the same numbers. The time is that of one rank's own work; the network adds the time of reducing
the given number of bytes.
"""

import argparse
import contextlib
import math
import random
import time
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from tables import publish, table
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_sparse.functional import magnitude_quantile, topk_masks

SPARSITY = 0.9
MOVED = 1.0005  # by how much the guess misses the threshold
LAYER = 16_000_000  # weights of a layer
PATIENCE = 5.0  # seconds; what takes longer is not tried on ten times as many weights
REPEATS = 3


def quantile(weights, near=None):
    return magnitude_quantile(weights, SPARSITY, near=near)


def masks(weights):
    return topk_masks(weights, round((1 - SPARSITY) * sum(weight.numel() for weight in weights)))


def flat(weights):
    return torch.cat([weight.flatten() for weight in weights]).abs_()


def rank(magnitudes):
    return int(SPARSITY * len(magnitudes))


# What is measured: from weights to a function without arguments.
OURS = {
    "quantile, cold": lambda weights: lambda: quantile(weights),
    "warm": lambda weights: partial(quantile, weights, quantile(weights) * MOVED),
    "topk_masks": lambda weights: lambda: masks(weights),
}
OTHERS = {
    "torch.sort": lambda weights: lambda: (found := flat(weights).sort().values)[rank(found)],
    "torch.kthvalue": lambda weights: lambda: (found := flat(weights)).kthvalue(rank(found)),
    "numpy.partition": lambda weights: lambda: (found := flat(weights).numpy()).partition(rank(found)),
}


def make(size):
    """Matrices like those of a large network, each with a scale of its own."""
    shapes = [(min(LAYER, size - start) // 1000, 1000) for start in range(0, size, LAYER)]
    return [torch.empty(shape).normal_(std=random.uniform(0.01, 0.03)) for shape in shapes]


def some(weights, size):
    """So many of the weights."""
    taken = []
    for weight in weights:
        taken.append(weight[: size // 1000])
        size -= taken[-1].numel()
        if size < 1000:
            return taken
    return taken


def seconds(function):
    """Median time of a call; one call is enough where it takes long."""
    taken = []
    while len(taken) < REPEATS and sum(taken) < PATIENCE:
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
    return median(taken)


def sizes(all_weights, counts):
    """Table of the time over the number of weights."""
    rows, last = [], Counter()
    for count in counts:
        weights = some(all_weights, count)
        cells = [f"{1000 * seconds(prepare(weights)):,.1f}" for prepare in OURS.values()]
        for name, prepare in OTHERS.items():
            # Each needs the magnitudes and a copy of them, two of these also an index.
            if last[name] > PATIENCE or free_memory() < 20 * count:
                cells.append("–")
                last[name] = math.inf
            else:
                last[name] = seconds(prepare(weights))
                cells.append(f"{1000 * last[name]:,.1f}")
        half = [weight.bfloat16() for weight in weights]
        cells[2:2] = [f"{1000 * seconds(prepare(half)):,.1f}" for prepare in list(OURS.values())[:2]]
        del half
        rows.append([f"{count:,}", *cells])
    cold, warm, *rest = OURS
    return table(["weights, ms", cold, warm, f"{cold}, bfloat16", f"{warm}, bfloat16", *rest, *OTHERS], rows)


def ranks(all_weights, total, worlds):
    """Table of the time of one of many ranks."""
    rows = []
    for world in worlds:
        own = total // world
        if own >= sum(weight.numel() for weight in all_weights) + 1000:
            rows.append([world, f"{own:,}", *["does not fit"] * 6])
            continue
        with simulated(world) as reduced:
            mesh = init_device_mesh("cpu", (world,))
            weights = [DTensor.from_local(w, mesh, [Shard(0)], run_check=False) for w in some(all_weights, own)]
            cells = []
            for prepare in OURS.values():
                function = prepare(weights)
                reduced.clear()
                function()
                cells += [f"{len(reduced)} × {max(reduced, default=0):,} B", f"{1000 * seconds(function):,.1f}"]
        rows.append([world, f"{own:,}", *cells])
    titles = [f"{name}, {what}" for name in OURS for what in ("reduced", "ms")]
    return table(["ranks", "weights of each", *titles], rows)


@contextlib.contextmanager
def simulated(world):
    """Rank 0 of so many, of which the others hold the same numbers; yields the sizes of the reductions."""
    reduced, real = [], dist.all_reduce

    def all_reduce(counts, *_, **__):
        reduced.append(counts.nbytes)
        counts *= world

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    dist.all_reduce = all_reduce
    try:
        yield reduced
    finally:
        dist.all_reduce = real
        dist.destroy_process_group()


def free_memory():
    """Bytes that can be had without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except OSError:
        return math.inf


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=[10**6, 10**7, 10**8, 10**9])
    parser.add_argument("--weights", type=int, default=7 * 10**9, help="weights of the model that is split over ranks")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 4, 16, 64, 256])
    parser.add_argument("--output", help="markdown file to write the tables to")
    args = parser.parse_args()
    parts = [args.weights // world for world in args.ranks]
    fits = [size for size in [*args.sizes, *parts] if 8 * size < free_memory()]
    weights = make(max(fits))
    text = f"""One process, all weights in float32 unless said otherwise, sparsity {SPARSITY}. A dash stands where a
function is too slow or needs too much memory:

{sizes(weights, [size for size in args.sizes if size in fits])}

Rank 0 of a model of {args.weights:,} float32 weights; the other ranks are simulated:

{ranks(weights, args.weights, args.ranks)}"""
    publish("What selection costs", text, args.output)


if __name__ == "__main__":
    main()
