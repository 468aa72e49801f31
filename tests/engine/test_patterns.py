"""Masks with a pattern: what is left is one, and training is that of the definition."""

import re

import lightning as L
import pytest
import torch
import transformers
from torch import nn

from lightning_sparse import ACDC, GMP, SparseTraining, StraightThroughMagnitude, TopKGradientAnnealing
from tests.engine.test_budgets import RAMP, dearest, remains
from tests.engine.test_budgets import train as train_priced
from tests.helpers.models import make_trainer
from tests.helpers.side_by_side import HOSTS, WEIGHTS, Net, assert_equal_training, make_data
from tests.reference import patterned as reference
from tests.reference.functional import groups

# Which layers suffer is not what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:.*has pruned all:UserWarning")
PATTERNS = ["1:2", "1:4", "block:4x1", "block:2x2", "channel"]
# Depthwise weights have a single input, the head has five outputs.
STEM, DEPTHWISE, GROUPED, HEAD = WEIGHTS
FITTING = {
    "1:2": [STEM, GROUPED, HEAD],
    "1:4": [GROUPED, HEAD],
    "block:4x1": [STEM, DEPTHWISE, GROUPED],
    "block:2x2": [STEM, GROUPED],
    "channel": WEIGHTS,
}
METHODS = {
    "hard": lambda **kw: SparseTraining(**RAMP, **kw),
    "GMP": lambda **kw: GMP(**RAMP, update_every_n_steps=3, **kw),
    "TopKGradientAnnealing": lambda **kw: TopKGradientAnnealing(distribution="global", **RAMP, **kw),
    "ACDC": lambda **kw: ACDC(start=0.1, end=0.7, sparse_phase=0.2, dense_phase=0.1, **kw),
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_training_equals_the_definition(pattern):
    sparsity = {"1:2": 0.5, "1:4": 0.75}.get(pattern, 0.6)
    assert_equal_training(
        StraightThroughMagnitude(0.9 if pattern[0] == "1" else sparsity, pattern=pattern, verbose=False),
        lambda thetas: reference.StraightThrough(
            {name: theta for name, theta in thetas.items() if name in FITTING[pattern]},
            [([name], sparsity) for name in FITTING[pattern]],
            pattern=pattern,
            start=0,
            end=0,
        ),
    )


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_left_has_the_pattern_and_the_sparsity(method, pattern):
    budget = {} if pattern[0] == "1" else {"sparsity": 0.6}
    callback, net = METHODS[method](pattern=pattern, verbose=False, **budget), Net(HOSTS["sgd"])
    make_trainer(callback, max_epochs=6).fit(net, make_data())
    assert sorted(callback.targets) == sorted(FITTING[pattern])
    for name in callback.targets:
        kept = net.get_parameter(name) != 0
        for members in groups(kept.shape, pattern).values():
            count = sum(int(kept[where]) for where in members)
            assert count == 1 if pattern[0] == "1" else count in (0, len(members))
    masks = [callback.mask(name) for name in callback.targets]
    size, largest = sum(mask.numel() for mask in masks), max(mask[0].numel() for mask in masks)
    wanted = {"1:2": 0.5, "1:4": 0.75}.get(pattern, 0.6)
    # Groups of different sizes cost their size; no more than one group is missing, of each layer if it has its own.
    slack = 0 if pattern[0] == "1" else largest * (len(masks) if method == "GMP" else 1)
    assert abs(sum(int((~mask).sum()) for mask in masks) - wanted * size) <= slack + 1e-6
    assert callback.target_reached


@pytest.mark.parametrize("pattern", ["channel", "block:2x2"])
def test_groups_within_a_budget_in_flops(pattern):
    callback = SparseTraining(flops=0.4, pattern=pattern, ignore=["layers.8"], verbose=False, **RAMP)
    net = train_priced(callback)
    group = 54 if pattern == "channel" else 4
    assert 0.4 - group * dearest(net, flops=0.4) < remains(net, callback, "flops") <= 0.4


def test_a_minimum_of_whole_channels():
    callback = SparseTraining(0.8, pattern="channel", minimum_density=0.1, verbose=False, **RAMP)
    net = Net(HOSTS["sgd"])
    with torch.no_grad():
        net.head.weight.mul_(1e-3)
    make_trainer(callback, max_epochs=4).fit(net, make_data())
    assert all(callback.mask(name).flatten(1).any(1).sum() >= 1 for name in WEIGHTS)


def test_weights_that_do_not_divide_stay_dense_and_the_table_says_why(capsys):
    class Mixed(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.wide, self.odd = nn.Linear(8, 8), nn.Linear(6, 3)
            self.up, self.hf = nn.ConvTranspose1d(4, 4, 1), transformers.pytorch_utils.Conv1D(4, 4)

        def training_step(self, batch, batch_idx):
            return self.wide(batch).sum() + self.odd(batch[:, :6]).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = SparseTraining(pattern="2:4", **RAMP)
    make_trainer(callback, max_epochs=2).fit(Mixed(), torch.utils.data.DataLoader(torch.randn(4, 8), batch_size=2))
    assert callback.targets == ["wide.weight"]
    reasons = {row.name: row.reason for row in callback.report().rows}
    assert reasons["odd.weight"] == "3×6 does not divide into 2:4"
    assert reasons["up.weight"] == "ConvTranspose1d has its inputs first, which 2:4 does not serve"
    assert reasons["hf.weight"] == "Conv1D has its inputs first, which 2:4 does not serve"
    assert "3×6 does not divide into 2:4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"sparsity": 0.6, "pattern": "2:4"},
            "beside the pattern '2:4', whose sparsity is 0.5, but got 0.6",
        ),
        ({"flops": 0.2, "pattern": "2:4"}, "but got `flops=0.2`. Leave that out."),
        (
            {"sparsity": 0.5, "overrides": {"a": {"sparsity": 0.1}}, "pattern": "2:4"},
            "but got [{'sparsity': 0.1}]. Leave that out.",
        ),
        ({"distribution": "erk", "pattern": "2:4"}, "to be 'global' or 'uniform' with the pattern '2:4'"),
        ({"sparsity": 0.5, "pattern": "row"}, "'block:AxB' or 'channel', but got 'row'."),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SparseTraining(**arguments)


def test_the_pattern_sets_the_sparsity():
    assert SparseTraining(pattern="2:4").final_sparsity == GMP(0.5, pattern="2:4").final_sparsity == 0.5
