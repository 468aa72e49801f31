"""Top-KAST against autograd, full sorts, and weights that are put back by hand."""

import itertools

import pytest
from lightning.pytorch.callbacks import LambdaCallback

from lightning_sparse import TopKAST
from lightning_sparse.functional import erdos_renyi
from tests.helpers.models import make_trainer
from tests.helpers.side_by_side import HOSTS, WEIGHTS, Net, assert_equal_training, hosts_and_dtypes, make_data
from tests.helpers.spent import BATCHES, assert_spent
from tests.reference import dense_gradients as reference

EACH = [([name], 0.7) for name in WEIGHTS]
OUTSIDE = dict.fromkeys(WEIGHTS, 0.4)
COMMON = {"strength": 0.01, "density": 0.3}
SETTINGS = {"sparsity": 0.7, "backward_sparsity": 0.4, "exploration_loss": 0.01, "verbose": False}


@hosts_and_dtypes
def test_training_equals_the_equations(host, dtype):
    """Sets are taken at the start, after steps 7, 14, ..., and a last time as exploration ends, after step 100."""
    assert_equal_training(
        TopKAST(**SETTINGS, end=10, update_every_n_steps=7),
        lambda thetas: reference.TopKAST(thetas, EACH, outside=OUTSIDE, **COMMON, end=10, every=7),
        host=host,
        dtype=dtype,
    )


@pytest.mark.parametrize("power", [1.0, 1.5])
def test_clipping_sees_the_whole_gradient(power):
    assert_equal_training(
        TopKAST(**SETTINGS, power=power, update_every_n_steps=1),
        lambda thetas: reference.TopKAST(thetas, EACH, outside=OUTSIDE, **COMMON, power=power, end=12, every=1),
        accumulate=2,
        clip=0.3,
    )


def test_distribution():
    """Every layer leaves the same share of its pruned weights alone."""
    shapes = [Net(HOSTS["sgd"]).get_parameter(name).shape for name in WEIGHTS]
    shares = dict(zip(WEIGHTS, erdos_renyi(shapes, 0.7), strict=True))
    pools, outside = [([n], s) for n, s in shares.items()], {n: s * 0.4 / 0.7 for n, s in shares.items()}
    assert_equal_training(
        TopKAST(**SETTINGS, distribution="erk", update_every_n_steps=7),
        lambda thetas: reference.TopKAST(thetas, pools, outside=outside, **COMMON, end=12, every=7),
    )


@pytest.mark.parametrize("backward_sparsity", [None, 0.0, 0.7, 0.95])
def test_backward_sets_of_all_and_of_the_kept_weights(backward_sparsity):
    outside = dict.fromkeys(WEIGHTS, min(0.7, backward_sparsity or 0.0))
    assert_equal_training(
        TopKAST(**{**SETTINGS, "backward_sparsity": backward_sparsity}, update_every_n_steps=7),
        lambda thetas: reference.TopKAST(thetas, EACH, outside=outside, **COMMON, end=12, every=7),
    )


@pytest.mark.parametrize("host", HOSTS)
def test_what_lies_outside_the_backward_set_is_not_touched(host):
    callback = TopKAST(**SETTINGS, update_every_n_steps=30)
    net, seen = Net(HOSTS[host]), []

    def watch(trainer, *args):
        (optimizer,) = trainer.optimizers
        latents = {name: callback.latent(name).clone() for name in WEIGHTS}
        slots = {n: [s for s in optimizer.state[net.get_parameter(n)].values() if s.ndim] for n in WEIGHTS}
        seen.append((latents, slots))

    probe = LambdaCallback(on_train_batch_end=watch)
    make_trainer(callback, probe, max_epochs=2).fit(net, make_data())
    for (before, _), (after, slots) in itertools.pairwise(seen):
        for name in WEIGHTS:
            still = before[name] == after[name]
            assert int(still.sum()) == round(0.4 * still.numel())
            assert slots[name]
            assert not any(slot[still].any() for slot in slots[name])


def test_flops():
    """Of the weight gradient, that of the backward set: 0.6 of all; once exploration is over, that of the kept."""
    assert_spent(
        TopKAST(**SETTINGS, end=6, update_every_n_steps=3),
        lambda step, density: 1 - (1 - density) * 0.4 / 0.7 if step + 1 < 6 * BATCHES else density,
    )
