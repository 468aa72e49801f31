"""Budgets kept to the weight by hard masks, ties included; ties that fall together at a soft threshold, and say so."""

import pytest
import torch
from torch import nn

from lightning_sparse import GMP, ST3, STR, AutoSparse, SparseTraining, ST3Sigma, TopKGradientAnnealing
from tests.helpers.models import make_trainer
from tests.helpers.side_by_side import HOSTS, STANDING_STILL, WEIGHTS, Net, make_data

HARD = {
    "GMP": lambda sparsity: GMP(sparsity, start=0, end=1, distribution="global", verbose=False),
    "SparseTraining": lambda sparsity: SparseTraining(sparsity, start=0, end=1, verbose=False),
    "TopKGradientAnnealing": lambda sparsity: TopKGradientAnnealing(sparsity, distribution="global", verbose=False),
}


def train(callback, equal, configure):
    """Train two epochs with the given weights all equal in magnitude, and return the zeros in each weight."""
    net = Net(configure, torch.float32)
    for name in equal:
        weight = net.get_parameter(name)
        nn.init.constant_(weight, 0.1)
        weight.data.view(-1)[::2] *= -1
    trainer = make_trainer(callback, max_epochs=2, limit_train_batches=4)
    trainer.fit(net, make_data(torch.float32))
    zeros = {name: int((net.get_parameter(name) == 0).sum()) for name in WEIGHTS}
    size = sum(net.get_parameter(name).numel() for name in WEIGHTS)
    assert callback.sparsity == sum(zeros.values()) / size
    assert float(trainer.callback_metrics["sparsity/total"]) == pytest.approx(callback.sparsity)  # single precision
    return zeros, size


@pytest.mark.filterwarnings("ignore:.*has pruned all")
@pytest.mark.parametrize("sparsity", [1 / 3, 0.99])
@pytest.mark.parametrize("equal", [["head.weight"], WEIGHTS])
@pytest.mark.parametrize("configure", [STANDING_STILL, HOSTS["sgd"]])
@pytest.mark.parametrize("method", HARD)
def test_hard_masks_end_within_one_weight_of_their_target(method, configure, equal, sparsity):
    zeros, size = train(HARD[method](sparsity), equal, configure)
    assert abs(sum(zeros.values()) - sparsity * size) < 1


@pytest.mark.filterwarnings("ignore:.*has pruned all")
@pytest.mark.parametrize("method", HARD)
def test_of_equal_weights_the_first_are_kept(method):
    callback = HARD[method](0.75)
    _, size = train(callback, WEIGHTS, STANDING_STILL)
    kept = torch.cat([callback.mask(name).flatten() for name in callback.targets])
    assert torch.equal(kept, torch.arange(size) < size - round(0.75 * size))


@pytest.mark.parametrize("method", [ST3, ST3Sigma])
def test_a_soft_threshold_without_ties_ends_within_one_weight_too(method):
    zeros, size = train(method(0.62, start=0, end=1, verbose=False), [], HOSTS["sgd"])
    assert abs(sum(zeros.values()) - 0.62 * size) < 1


@pytest.mark.parametrize(
    "callback",
    [
        ST3(0.5, start=0, end=1, verbose=False),
        ST3Sigma(0.5, start=0, end=1, verbose=False),
        STR(threshold_init=-2.0, verbose=False),  # sigmoid(-2) = 0.119
        AutoSparse(threshold_init=-2.0, verbose=False),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_a_soft_threshold_prunes_equal_weights_together_and_says_so(callback):
    with pytest.warns(UserWarning, match=r"has pruned all 240 weights of `head\.weight` \(a threshold prunes equal"):
        zeros, size = train(callback, ["head.weight"], STANDING_STILL)
    assert zeros["head.weight"] == 240
    assert sum(zeros.values()) >= (callback.final_sparsity or 0.0) * size
