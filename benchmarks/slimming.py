"""How much faster ResNet-50 runs without its dead channels, in each engine against the dense model in the same one.

    python benchmarks/slimming.py --engines eager compiled

In ``--dead half`` half of the outputs of the two inner convolutions of each block have no weights, and batch norm has
statistics as after a training, so that some dead channels are positive constants. In ``--dead silent`` these constants
are negative, so that ReLU makes zeros of all of them. Weights are random; the time does not depend on them. All calls
are timed side by side, in an order drawn anew for each round. The dense model is compiled twice: how far the two differ
is the error, and the faster one is what the others are compared with.
"""

import argparse
import copy
import itertools
import tempfile
from pathlib import Path

import onnxruntime
import torch
from networks import ResNet50
from tables import publish, table
from torch import nn

from lightning_sparse.export import slim, to_onnx
from lightning_sparse.export.timing import time_calls


@torch.no_grad()
def make_model(dead):
    torch.manual_seed(0)
    model = ResNet50().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.normal_(0, 0.1)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2.0)
    for name, module in model.named_modules():
        if name.endswith(("layer.0", "layer.1")):
            killed = torch.randperm(module.convolution.out_channels)[: module.convolution.out_channels // 2]
            module.convolution.weight[killed] = 0.0
            if dead == "silent":
                module.normalization.running_mean[killed] = 0.0
                module.normalization.bias[killed] = -module.normalization.bias[killed].abs()
    return model


def eager(model, images):
    return lambda: model(images)


def compiled(model, images):
    program = torch.compile(model, options={"freezing": True})
    return lambda: program(images)


def compiled_bf16(model, images):
    return compiled(model.bfloat16(), images.bfloat16())


def onnx_runtime(model, images):
    with tempfile.TemporaryDirectory() as folder:
        to_onnx(model, images, Path(folder) / "model.onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(Path(folder) / "model.onnx"), options)
    feed = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, feed)


ENGINES = {"eager": eager, "compiled": compiled, "compiled, bf16": compiled_bf16, "ONNX Runtime": onnx_runtime}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--dead", nargs="+", default=["half", "silent"], choices=["half", "silent"])
    parser.add_argument("--multiples", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", help="file to write the table to")
    options = parser.parse_args()
    images = torch.randn(options.batch, 3, options.size, options.size)
    dense, calls, texts = make_model("half"), {}, []
    models = {"dense": dense, "dense, again": dense}
    for dead, multiple in itertools.product(options.dead, options.multiples):
        name = f"slim ({dead}, multiples of {multiple})"
        models[name] = made = slim(make_model(dead), images, multiple_of=multiple)
        before, after = made.slimming.parameters
        texts.append(
            f"{name}: {before / 1e6:.1f} M parameters before, {after / 1e6:.1f} M after; outputs differ by"
            f" {made.slimming.difference:.0e} of the largest."
        )
    for engine in options.engines:
        for name, model in models.items():
            copied = copy.deepcopy(model)
            calls[engine, name] = ENGINES[engine](copied, images)
    times = time_calls(calls, rounds=options.rounds)
    rows, base = [], {engine: min(times[engine, "dense"], times[engine, "dense, again"]) for engine in options.engines}
    for engine in options.engines:
        for name in models:
            time = times[engine, name]
            rows.append([engine, name, f"{1000 * time:.1f}", f"{base[engine] / time:.2f}"])
    strongest = min(base, key=base.get)
    for name in models:
        if name.startswith("slim"):
            best = min(options.engines, key=lambda engine: times[engine, name])
            ratio = base[strongest] / times[best, name]
            texts.append(f"{name}: {best} is {ratio:.2f} × as fast as the fastest dense one, {strongest}.")
    text = f"Batch of {options.batch}, {options.size}×{options.size} pixels.\n\n"
    text += table(["engine", "model", "ms", "times as fast as the faster dense one"], rows)
    text += "\n\n" + "\n".join(f"- {line}" for line in texts)
    publish("Speed of a slimmed model", text, options.output)


if __name__ == "__main__":
    main()
