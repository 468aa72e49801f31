"""What subnormal numbers among the weights cost, before and after batch norms are folded into convolutions.

    python benchmarks/subnormals.py

A network of eight 3×3 convolutions with batch norm and ReLU, 90 % of the weights and half of the channels pruned. What
is pruned is 0, or ±1e-40 (what decay leaves where nothing sets weights to zero); or a pruned channel has a beta of
1e-40 in its batch norm, which then is what the next layer gets; or its weights and the weight of its batch norm are
1e-20, ordinary numbers until a runtime folds one into the other. One thread.
"""

import argparse
import tempfile
from pathlib import Path

import onnxruntime
import torch
from tables import publish, table
from torch import nn

from lightning_sparse.export import flush_subnormals, to_onnx
from lightning_sparse.export.timing import time_calls

WIDTH, LAYERS, PIXELS = 64, 8, 28


@torch.no_grad()
def make_model(pruned, *, channel=None, scale=1.0, beta=0.0):
    """Nine weights in ten are this number, and all of half of the channels, which batch norm scales and shifts."""
    torch.manual_seed(0)
    layers = []
    for _ in range(LAYERS):
        conv, norm = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH)
        signs = conv.weight.sign()
        conv.weight.copy_(torch.where(torch.rand_like(conv.weight) < 0.9, pruned * signs, conv.weight))
        if channel is not None:
            conv.weight[: WIDTH // 2] = channel * signs[: WIDTH // 2]
            norm.weight[: WIDTH // 2], norm.bias[: WIDTH // 2] = scale, beta
        layers += [conv, norm, nn.ReLU()]
    return nn.Sequential(*layers).eval()


def eager(model, images):
    return lambda: model(images)


def flushing(model, images):
    """With the processor told to take them for zeros."""

    def run():
        torch.set_flush_denormal(True)
        try:
            return model(images)
        finally:
            torch.set_flush_denormal(False)

    return run


def onnx_runtime(model, images, flag="0"):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.set_denormal_as_zero", flag)
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file, torch.no_grad():
        torch.onnx.export(model, (images,), file.name, dynamo=True, external_data=False, verbose=False)
        session = onnxruntime.InferenceSession(file.name, options)
    feed = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, feed)


def onnx_runtime_flushing(model, images):
    return onnx_runtime(model, images, flag="1")


ENGINES = {
    "eager": eager,
    "eager, `torch.set_flush_denormal`": flushing,
    "ONNX Runtime": onnx_runtime,
    "ONNX Runtime, `session.set_denormal_as_zero`": onnx_runtime_flushing,
}


def handed_over(model, images):
    """By `to_onnx`, which flushes."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        to_onnx(model, images, Path(folder) / "model.onnx")
        session = onnxruntime.InferenceSession(str(Path(folder) / "model.onnx"), options)
    feed = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, feed)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", help="file to write the table to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = torch.randn(1, WIDTH, PIXELS, PIXELS)
    models = {
        "zeros": make_model(0.0, channel=0.0),
        "zeros, again": make_model(0.0, channel=0.0),
        "subnormal weights": make_model(1e-40),
        "subnormal channels": make_model(1e-40, channel=1e-40),
        "subnormal betas": make_model(0.0, channel=0.0, beta=1e-40),
        "flushed": flush_subnormals(make_model(1e-40, channel=1e-40, beta=1e-40)),
        "subnormal once folded": make_model(0.0, channel=1e-20, scale=1e-20),
    }
    calls = {(engine, name): make(model, images) for engine, make in ENGINES.items() for name, model in models.items()}
    written = "`to_onnx`, ONNX Runtime"
    calls |= {(written, name): handed_over(model, images) for name, model in models.items()}
    times = time_calls(calls, rounds=options.rounds)
    rows = [
        [
            engine,
            f"{1000 * times[engine, 'zeros']:.2f}",
            *(f"{times[engine, n] / times[engine, 'zeros']:.2f}" for n in models),
        ]
        for engine in [*ENGINES, written]
    ]
    text = (
        f"{LAYERS} convolutions of {WIDTH} channels on {PIXELS}×{PIXELS} pixels. Times relative to pruned weights that"
        " are zeros, in the same engine. It depends on the processor: on some, others have reported a multiple of the"
        " time (https://github.com/FasterAI-Labs/fasterai/pull/82).\n\n" + table(["engine", "ms, zeros", *models], rows)
    )
    publish("What subnormal numbers cost", text, options.output)


if __name__ == "__main__":
    main()
