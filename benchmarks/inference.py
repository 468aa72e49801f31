"""Measure whether `accelerate` makes a sparse model faster than the strongest dense one on this machine.

    python benchmarks/inference.py                          # everything
    python benchmarks/inference.py --models mlp --threads 1

Random weights, the smallest of each layer set to zero. All arms of a table run in one process, in an order drawn anew
in each round; figures are medians, `dense, again` is the first arm once more and shows the noise. Dense arms do not
care which weights are zero. Compiled arms are `torch.compile` with frozen weights. The table of single layers is what
the rules of `explain` were made from: time of `nn.Linear` divided by that of the sparse layer.
"""

import argparse
import copy
import tempfile
import time
import warnings
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from tables import publish, table
from torch import nn
from transformers import BertConfig, BertModel, ResNetConfig, ResNetForImageClassification

from lightning_sparse.export import accelerate, acceleration
from lightning_sparse.export.csr import CSRLinear
from lightning_sparse.export.timing import time_calls

SPARSITIES = (0.8, 0.9, 0.95)
# Least speed-up over the best dense float32 at each sparsity, and over compiled bfloat16.
GOALS = {("mlp", 1): ((1.7, 3.0, 4.8), (1.3, 2.2, 3.5)), ("bert", 1): ((None, 1.3, 1.5), (None, None, None))}
LAYERS = ((256, 256), (1024, 1024), (3072, 768), (4096, 4096))
ROWS = (1, 8, 64, 512)


class Tensors(nn.Module):
    """A Hugging Face model that takes and returns one tensor."""

    def __init__(self, model, output):
        super().__init__()
        self.model, self.output = model, output

    def forward(self, x):
        return getattr(self.model(x), self.output)


def make_mlp():
    sizes = [768, 3072] * 4 + [768]
    return nn.Sequential(*(m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())))


def make_bert():
    return Tensors(BertModel(BertConfig()), "last_hidden_state")


def make_resnet50():
    return Tensors(ResNetForImageClassification(ResNetConfig()), "logits")


MODELS = {
    "mlp": (make_mlp, lambda batch: torch.randn(batch, 768), (1, 64)),
    "bert": (make_bert, lambda batch: torch.randint(1000, (batch, 128)), (1,)),
    "resnet50": (make_resnet50, lambda batch: torch.randn(batch, 3, 224, 224), (1,)),
}


def prune(model, sparsity):
    """Set the smallest weights of each layer to zero; the others grow, so that signals do not die out."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            threshold = module.weight.abs().flatten().kthvalue(round(sparsity * module.weight.numel())).values
            module.weight *= (module.weight.abs() > threshold) / (1 - sparsity) ** 0.5
    return model


def make_session(model, x, folder):
    """The model in ONNX Runtime, as a call; none where that is not installed."""
    try:
        import onnxruntime
    except ModuleNotFoundError:
        return None
    path = Path(folder) / "model.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def measure(name, batch, args):
    """Tables of one model: all arms, and the layers that were swapped."""
    make, make_input, _ = MODELS[name]
    x, plain = make_input(batch), make().eval()
    narrow = x.bfloat16() if x.is_floating_point() else x
    dense = prune(copy.deepcopy(plain), args.sparsities[0])
    half = copy.deepcopy(dense).bfloat16()
    compiled, compiled_half = torch.compile(dense), torch.compile(half)
    arms = {
        "dense": lambda: dense(x),
        "dense, again": lambda: dense(x),
        "dense, compiled": lambda: compiled(x),
        "dense bf16": lambda: half(narrow),
        "dense bf16, compiled": lambda: compiled_half(narrow),
    }
    swapped = {}
    for sparsity in args.sparsities:
        model = prune(copy.deepcopy(plain), sparsity)
        fast = accelerate(model, x, seconds=args.seconds)
        report = fast.acceleration
        swapped[sparsity] = f"{len(report.accelerated)}/{len(report.layers)}"
        arms[f"accelerated {sparsity:.0%}"] = lambda fast=fast: fast(x)
        if args.compile_accelerated:
            both = torch.compile(fast)
            arms[f"accelerated {sparsity:.0%}, compiled"] = lambda both=both: both(x)
            torch.testing.assert_close(both(x), model(x), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-3, atol=1e-3)
    with tempfile.TemporaryDirectory() as folder:
        if session := make_session(dense, x, folder):
            arms["dense, ONNX Runtime"] = session
            torch.testing.assert_close(session(), dense(x), rtol=1e-3, atol=1e-3)
        times = time_calls(arms, seconds=args.seconds, rounds=15, clock=args.clock)
    return show(name, batch, times, swapped)


def show(name, batch, times, swapped):
    """Markdown of the times of one model, with the goals."""
    best = min((arm for arm in times if arm.startswith("dense") and "bf16" not in arm), key=times.get)
    half = min((arm for arm in times if "bf16" in arm), key=times.get)
    rows = [
        [arm, f"{1000 * taken:.2f}", *(f"{times[other] / taken:.2f}" for other in ("dense", best, half))]
        for arm, taken in times.items()
    ]
    text = f"## {name}, batch {batch}\n\n" + table(
        ["", "ms", "times as fast as dense", f"as {best}, the best float32", f"as {half}"], rows
    )
    text += "\n\nSparse layers: " + ", ".join(f"{layers} at {sparsity:.0%}" for sparsity, layers in swapped.items())
    for other, goals in zip((best, "dense bf16, compiled"), GOALS.get((name, batch), ()), strict=False):
        for sparsity, goal in zip(SPARSITIES, goals, strict=True):
            if goal and sparsity in swapped:
                ours = min(taken for arm, taken in times.items() if arm.startswith(f"accelerated {sparsity:.0%}"))
                gain = times[other] / ours
                verdict = "reached" if gain >= goal else "**not reached**"
                text += f"\n- {sparsity:.0%} zeros, over {other}: {gain:.2f} ×, goal {goal} × {verdict}"
    return text


def measure_layers(args):
    """Table of single layers: what a sparse one gains, by shape, rows and sparsity."""
    rows = []
    for out_features, in_features in LAYERS:
        for count in ROWS:
            dense = nn.Linear(in_features, out_features)
            x = torch.randn(count, in_features)
            arms = {"dense": lambda dense=dense, x=x: dense(x), "again": lambda dense=dense, x=x: dense(x)}
            for sparsity in (0.5, 0.7, *SPARSITIES):
                sparse = CSRLinear(prune(nn.Sequential(copy.deepcopy(dense)), sparsity)[0])
                arms[f"{sparsity:.0%}"] = lambda sparse=sparse, x=x: sparse(x)
            times = time_calls(arms, seconds=args.seconds / 4, clock=args.clock)
            ratios = [f"{times['dense'] / taken:.2f}" for arm, taken in times.items() if arm != "dense"]
            rows.append([f"{out_features}×{in_features}", count, f"{1e6 * times['dense']:.0f}", *ratios])
    return "## Single linear layers\n\n" + table(
        ["shape", "rows", "dense µs", "dense, again", *(f"{s:.0%} zeros" for s in (0.5, 0.7, *SPARSITIES))], rows
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ["layers", *MODELS]
    parser.add_argument("--models", nargs="+", choices=known, default=known)
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES))
    parser.add_argument("--seconds", type=float, default=8.0, help="how long to measure each table")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="as the clock, for a busy machine and one thread")
    parser.add_argument("--compile-accelerated", action="store_true", help="also the accelerated models, compiled")
    parser.add_argument("--output", help="markdown file to write the tables to")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.clock = time.thread_time if args.cpu_time else time.perf_counter
    acceleration.time_calls = partial(time_calls, clock=args.clock)
    torch.manual_seed(0)
    torch._inductor.config.freezing = True  # what makes compiled dense models fastest
    torch._dynamo.config.recompile_limit = 100  # all networks of one class count as one
    warnings.simplefilter("ignore")
    with torch.no_grad():
        parts = [
            part
            for name in args.models
            for part in (
                [measure_layers(args)]
                if name == "layers"
                else [measure(name, batch, args) for batch in MODELS[name][2]]
            )
        ]
    publish("Whether zeros make inference faster", "\n\n".join(parts), args.output)


if __name__ == "__main__":
    main()
