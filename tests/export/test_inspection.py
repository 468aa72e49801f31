"""The zeros of anybody's checkpoint are counted right, and nothing in it is run."""

import argparse
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrize, prune

from lightning_sparse import GMP, ST3
from lightning_sparse.export import inspect_checkpoint, save_sparse
from tests.helpers.models import Classifier, fit


def net_with_zeros():
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    with torch.no_grad():
        net[0].weight.view(-1)[:9] = 0.0
        net[2].weight.view(-1)[:4] = -0.0
        net[2].bias.fill_(1.0)
    return net


def zeros(report):
    return {row.name: row.zeros for row in report.rows if row.treated}


EXPECTED = {"0.weight": 9, "2.weight": 4}


class Settings:
    """Found in nobody's list of classes that are safe to load."""


def write_lightning(net, path):
    settings = {"hyper_parameters": argparse.Namespace(own=Settings()), "loops": Counter("aab"), "epoch": 3}
    torch.save({"state_dict": net.state_dict(), **settings}, path)


def write_compiled(net, path):
    torch.save({"model": {f"_orig_mod.{name}": tensor for name, tensor in net.state_dict().items()}}, path)


def write_legacy(net, path):
    torch.save(net.state_dict(), path, _use_new_zipfile_serialization=False)


def write_half(net, path):
    save_file(net.bfloat16().state_dict(), path)


WRITERS = {
    "state dict": lambda net, path: torch.save(net.state_dict(), path),
    "legacy": write_legacy,
    "Lightning": write_lightning,
    "compiled": write_compiled,
    "safetensors": write_half,
    "packed": save_sparse,
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_zeros_are_counted_whoever_has_written_the_file(write):
    net = net_with_zeros()
    write(net, "file")
    report = inspect_checkpoint("file")
    assert zeros(report) == EXPECTED
    assert report.totals["sparsity/total"] == 13 / 36
    floats = [tensor for tensor in net.state_dict().values() if tensor.is_floating_point()]
    expected = sum(int((t == 0).sum()) for t in floats) / sum(t.numel() for t in floats)
    assert report.totals["sparsity/model"] == pytest.approx(expected)


def test_masks_of_torch_prune_are_applied():
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    prune.l1_unstructured(net[0], "weight", 0.5)
    prune.l1_unstructured(net[1], "bias", 1)
    torch.save(net.state_dict(), "file")
    report = inspect_checkpoint("file")
    assert {row.name: row.zeros for row in report.rows} == {"0.weight": 12, "0.bias": 0, "1.weight": 0, "1.bias": 1}


class Masked(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight):
        return weight * self.mask


def test_masks_of_parametrizations_are_applied():
    net = nn.Sequential(nn.Linear(4, 6))
    parametrize.register_parametrization(net[0], "weight", Masked(torch.rand(6, 4) < 0.5))
    torch.save(net.state_dict(), "file")
    assert zeros(inspect_checkpoint("file")) == {"0.weight": int((net[0].weight == 0).sum())}


@pytest.mark.parametrize("method", [ST3, GMP])
def test_own_checkpoints_tell_what_the_callback_tells(method):
    callback = method(0.7, verbose=False)
    fit(Classifier(), callback).save_checkpoint("file")
    found, expected = inspect_checkpoint("file"), callback.report()
    assert found.method == method.__name__
    assert zeros(found) == zeros(expected)
    assert {row.name: row.flops for row in found.rows if row.treated} == {
        row.name: row.flops for row in expected.rows if row.treated
    }
    for key, value in found.totals.items():
        if key != "sparsity/model":  # buffers are no parameters, but a file does not tell which they are
            assert value == pytest.approx(expected.totals[key]), key
    assert found.totals.keys() == {"sparsity/total", "sparsity/model", "flops/inference", "flops/inference_ratio"}


# -- files that are not what they should be ---------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return os.mkdir, ("run",)


@pytest.mark.parametrize(("zipped", "asked"), [(True, "posix.mkdir"), (False, "more than tensors")])
def test_nothing_in_a_file_is_run(zipped, asked):
    torch.save({"state_dict": {"a": torch.ones(2)}, "evil": Evil()}, "file", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=f"cannot be read: it asks for {asked}, which is not run"):
        inspect_checkpoint("file")
    assert not Path("run").exists()


def test_a_whole_module_is_not_built():
    torch.save(nn.Linear(2, 2), "file")
    with pytest.raises(ValueError, match=r"holds an object. Save its `state_dict\(\)`"):
        inspect_checkpoint("file")


@pytest.mark.parametrize("content", [{}, {"a": 1}, {"a": torch.arange(3)}], ids=str)
def test_a_file_without_weights(content):
    torch.save(content, "file")
    with pytest.raises(ValueError, match="to hold floating-point tensors, but got none"):
        inspect_checkpoint("file")


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_file_cut_short_is_refused(write):
    write(net_with_zeros(), "file")
    data = Path("file").read_bytes()
    for end in (0, 1, 10, len(data) // 2, len(data) - 30):
        Path("cut").write_bytes(data[:end])
        with pytest.raises(ValueError, match=r"^Expected cut to be a .*, but "):
            inspect_checkpoint("cut")


def test_rubbish_folders_and_missing_files_are_told_apart():
    Path("rubbish").write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match="Expected rubbish to be a safetensors file"):
        inspect_checkpoint("rubbish")
    Path("folder").mkdir()
    with pytest.raises(ValueError, match="it is a folder"):
        inspect_checkpoint("folder")
    with pytest.raises(FileNotFoundError):
        inspect_checkpoint("missing")
