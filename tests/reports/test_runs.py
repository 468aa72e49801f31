"""The file of a run: masks come back bit for bit, whatever is damaged is said or left out."""

import base64
import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_sparse.reports import read_run, runs
from lightning_sparse.reports.runs import RunFile
from tests.helpers.recorded import make_run

NAMES = ["stem.weight", "body.0.weight", "head.weight"]


@pytest.mark.parametrize("density", [0.0, 0.0005, 0.01, 0.1, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("total", [0, 1, 255, 256, 257, 100_000])
def test_changes_come_back_bit_for_bit(density, total):
    flips = np.random.default_rng(total).random(total) < density
    found = runs._decode(runs._encode(flips), total)
    assert found.tolist() == np.flatnonzero(flips).tolist()


@pytest.mark.parametrize("density", [0.001, 0.01, 0.03, 0.1])
def test_random_changes_take_little_more_than_their_entropy(density):
    flips = np.random.default_rng(0).random(1_000_000) < density
    entropy = -(density * np.log2(density) + (1 - density) * np.log2(1 - density))
    assert len(runs._encode(flips)) * 8 / 1_000_000 < 4 / 3 * 1.2 * entropy  # base64 adds a third


def test_whole_channels_take_next_to_nothing():
    mask = np.zeros((1000, 1000), bool)
    mask[::7] = True
    assert len(runs._encode(mask.ravel())) < 2000


def test_masks_of_every_epoch_come_back():
    run = make_run(Path("run.jsonl"), NAMES)
    before = None
    for epoch in run.epochs:
        masks = run.masks(epoch)
        assert list(masks) == NAMES
        assert {mask.dtype for mask in masks.values()} == {torch.bool}
        assert [int((~mask).sum()) for mask in masks.values()] == run.records[epoch]["zeros"]
        assert run.kept[epoch].tolist() == [int(mask.sum()) for mask in masks.values()]
        for i, name in enumerate(NAMES) if before is not None else ():
            both, either = int((masks[name] & before[name]).sum()), int((masks[name] | before[name]).sum())
            assert run.overlap[epoch, i] == pytest.approx(both / either)
        before = masks
    assert np.isnan(run.overlap[0]).all()
    assert all(torch.equal(run.masks()[name], before[name]) for name in NAMES)
    with pytest.raises(ValueError, match=r"^Expected argument `epoch` to be one of \[0, 1, .*\], but got 99\.$"):
        run.masks(99)


def test_the_documented_lines_read_the_file():
    run = make_run(Path("run.jsonl"), NAMES)
    code = runs.__doc__.partition("without this package::\n")[2]
    found = {}
    exec(re.sub("^    ", "", code, flags=re.MULTILINE), found)
    expected = torch.cat([mask.flatten() for mask in run.masks().values()])
    assert found["mask"].tolist() == expected.tolist()


def test_a_folder_stands_for_the_file_in_it():
    Path("st3").mkdir()
    make_run(Path("st3/run.jsonl"), NAMES)
    assert read_run("st3").name == "st3"
    assert read_run("st3").epochs == list(range(13))


def test_without_masks_all_else_is_there():
    run = make_run(Path("run.jsonl"), NAMES, masks=False)
    assert run.total_sparsity[12] > 0.8
    assert np.isnan(run.overlap).all()
    with pytest.raises(ValueError, match=r"^Expected `run` to be recorded with masks, but it was with `masks=False`"):
        run.masks()


@pytest.mark.parametrize("cut", [1, 40])
def test_a_line_that_a_crash_has_cut_off_is_ignored_and_replaced(cut):
    path = Path("run.jsonl")
    whole = make_run(path, NAMES)
    header = json.loads(path.read_text().splitlines()[0])
    path.write_bytes(path.read_bytes()[:-cut])
    assert read_run(path).records == whole.records[:-1]
    file = RunFile(path, {key: header[key] for key in ("methods", "weights")})
    file.open(step=1000)
    assert file.epoch == 11
    file.append(whole.records[-1], [mask.flatten().numpy() for mask in whole.masks().values()])
    assert read_run(path).records == whole.records


def damage(change):
    lines = Path("run.jsonl").read_text().splitlines()
    record = json.loads(lines[3])
    change(record)
    lines[3] = json.dumps(record)
    Path("run.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("epoch"),
        lambda record: record.update(zeros=[1]),
        lambda record: record.update(metrics=[]),
        lambda record: record.update(step="ten"),
        lambda record: record.update(masks="AAAA"),
        lambda record: record.update(masks=runs._encode(np.ones(10_000, bool))),
    ],
    ids=["missing", "short", "type", "number", "garbage", "too long"],
)
def test_damaged_lines_are_named(change):
    make_run(Path("run.jsonl"), NAMES)
    damage(change)
    with pytest.raises(ValueError, match=r"^Expected 'run\.jsonl' to be undamaged, but line 4 does not belong there"):
        read_run("run.jsonl")


def test_lines_that_are_no_json_are_named():
    make_run(Path("run.jsonl"), NAMES)
    Path("run.jsonl").write_text(Path("run.jsonl").read_text().replace('{"epoch": 2', "{epoch"))
    with pytest.raises(ValueError, match=r"^Expected 'run\.jsonl' to be undamaged, but line 4 cannot be read\.$"):
        read_run("run.jsonl")


@pytest.mark.parametrize(
    "text", ["", "weights\n", "[]\n", '{"format": "lightning-sparse run 1"}\n', "[" * 100_000 + "\n", "\x00\n"]
)
def test_other_files_are_refused(text):
    Path("other").write_text(text)
    with pytest.raises(ValueError, match=r"^Expected argument `path` to be a file that `RunRecorder` has written"):
        read_run("other")


def test_a_bomb_does_not_go_off():
    text = base64.b64encode(zlib.compress(bytes(50_000_000))).decode()
    with pytest.raises(ValueError, match=r"entry \d+ of 100"):
        runs._decode(text, 100)
