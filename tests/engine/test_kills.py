"""Law 4 under SIGKILL, exceptions and a full disk at arbitrary moments: training ends as if nothing had happened.

Every moment is drawn from a seed: a line of Python among all that a whole training executes in some part of the
programs, a time, or a number of bytes.
"""

import multiprocessing
import random
import shutil
import signal
import time
from collections import Counter

import pytest
import torch

from tests.helpers.assertions import assert_same, count_sparsity
from tests.helpers.killed import FAILED, FINISHED, PLACES, RAISED, Fault, Life, newest, readable, serve
from tests.helpers.models import Classifier
from tests.helpers.ranks import find_port
from tests.helpers.strategies import SETTINGS

KILLED = -signal.SIGKILL
KILLS = -(-200 // len(SETTINGS))  # of every strategy, so that there are 200 in all
CHECKPOINTS, SMALLEST = 6, 25_000  # how many a training writes at least, of so many bytes


@pytest.fixture(scope="module")
def lives():
    """Send a life, receive how it ended. The process that forks them has neither threads nor a process group."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve, args=(theirs,))
    server.start()
    ours.recv()
    yield ours
    server.terminate()
    server.join()


def draw(kind, lines, seconds, rng):
    """A fault of this kind at a random moment of a training that takes so many lines and seconds."""
    if kind in ("cut", "full"):
        return Fault(kind, rng.randrange(1, CHECKPOINTS), rng.randrange(SMALLEST))
    if kind == "alarm":
        return Fault(kind, None, rng.uniform(0.0, seconds))
    place = rng.choice(PLACES)
    return Fault(kind, place, rng.randrange(1, 1 + sum(n for path, n in lines.items() if place in path)))


def live(lives, *together):
    """Live lives, at the same time; return how they ended."""
    lives.send(together)
    ends = lives.recv()
    for life, end in zip(together, ends, strict=True):
        assert end != FAILED, f"{life}\n{life.log.read_text()}"
    return ends


def check_newest(folder):
    """The newest checkpoint holds a model as sparse as was logged, which loads without our callback."""
    checkpoint = newest(folder, "step=*.ckpt")
    if checkpoint is not None:
        model = Classifier.load_from_checkpoint(checkpoint, weights_only=True)
        states = torch.load(checkpoint, weights_only=True)["callbacks"].values()
        names = next(list(state["latents"]) for state in states if "latents" in state)
        logged = float(checkpoint.stem.partition("sparsity=")[2])
        assert count_sparsity(model, names) == pytest.approx(logged, abs=1e-5)  # one weight more or less is 1e-3


def torment(lives, folder, name, kinds, deaths, *, in_place=False):
    """Let training die so often; compare whatever reaches its end with the undisturbed training.

    Returns:
        How often each way of ending occurred, and under ``"torn"`` how many unreadable checkpoints were met.
    """
    rng, ends = random.Random(f"{name} {kinds}"), Counter()
    whole, disturbed = folder / "whole", folder / "disturbed"
    whole.mkdir()
    disturbed.mkdir()
    undisturbed, start = Life(whole, name), time.monotonic()
    assert live(lives, undisturbed) == [FINISHED]
    lines, seconds = torch.load(undisturbed.end, weights_only=False)["lines"], time.monotonic() - start
    died = 0
    while True:
        fault = draw(rng.choice(kinds), lines, seconds, rng) if died < deaths else None
        life = Life(disturbed, name, fault, in_place)
        [end] = live(lives, life)
        ends[end] += 1
        ends["torn"] += sum(not readable(path) for path in disturbed.glob("*.ckpt"))
        check_newest(disturbed)
        if end != FINISHED:
            died += 1
            continue
        check_end(life, undisturbed)
        if fault is None:
            return ends
        shutil.rmtree(disturbed)
        disturbed.mkdir()


def check_end(life, undisturbed):
    actual, expected = (torch.load(one.end, weights_only=False)["outcome"] for one in (life, undisturbed))
    for key in expected.keys() - {"logged", "random"}:  # not restored if nothing was left to train
        assert_same(actual[key], expected[key], f"{life} {key}")


def test_whatever_happens_training_ends_as_if_nothing_had(lives, tmp_path):
    torment(lives, tmp_path, "AutoSparse", ["kill", "alarm", "cut", "raise", "interrupt", "full"], 6)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_killed_at_any_moment(lives, tmp_path, name):
    ends = torment(lives, tmp_path, name, ["kill", "kill", "alarm"], KILLS)
    assert ends.keys() == {FINISHED, KILLED, "torn"}
    assert ends[KILLED] >= KILLS
    assert not ends["torn"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_an_exception_on_any_line(lives, tmp_path, name):
    ends = torment(lives, tmp_path, name, ["raise", "interrupt"], 10)
    assert ends.keys() == {FINISHED, RAISED, "torn"}
    assert not ends["torn"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ST3", "TopKGradientAnnealing", "AutoSparse", "GMP"])
@pytest.mark.parametrize("in_place", [False, True])
def test_the_end_in_the_middle_of_a_file(lives, tmp_path, name, in_place):
    ends = torment(lives, tmp_path, name, ["cut", "full"], 8, in_place=in_place)
    assert ends.keys() == {FINISHED, RAISED, -signal.SIGXFSZ, "torn"}
    assert (ends["torn"] > 0) == in_place  # Lightning itself moves a checkpoint to its place once it is whole


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ST3", "AutoSparse", "GMP"])
@pytest.mark.parametrize("dying", [0, 1])
def test_a_rank_that_dies(lives, tmp_path, name, dying):
    """The other rank notices at once and ends sparse, and both resume."""
    rng, folders = random.Random(f"{name} {dying}"), [tmp_path / part for part in ("whole", "swap", "loop")]
    whole, *places = folders
    for folder in folders:
        folder.mkdir()

    def train(folder, faults=(None, None)):
        port = find_port()
        ranks = [Life(folder, name, fault, rank=rank, port=port) for rank, fault in enumerate(faults)]
        return ranks, live(lives, *ranks)

    undisturbed, ends = train(whole)
    assert ends == [FINISHED, FINISHED]
    counts = torch.load(undisturbed[dying].end, weights_only=False)["lines"]
    for folder, place in zip(places, ("lightning_sparse/engine/weights", "lightning/pytorch/"), strict=True):
        total = sum(n for path, n in counts.items() if place in path)
        faults = [Fault("peer", None, 0)] * 2
        faults[dying] = Fault("kill", place, rng.randrange(total // 4, total * 3 // 4))
        assert sorted(train(folder, faults)[1]) == [KILLED, RAISED]
        check_newest(folder)
        ranks, ends = train(folder)
        assert ends == [FINISHED, FINISHED]
        for rank in (0, 1):
            check_end(ranks[rank], undisturbed[rank])
