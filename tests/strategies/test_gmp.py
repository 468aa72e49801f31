"""GMP against autograd through masks that are taken by a full sort."""

import itertools

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback

from lightning_sparse import GMP
from tests.helpers.models import make_trainer
from tests.helpers.side_by_side import EPOCHS, HOSTS, WEIGHTS, Net, assert_equal_training, host, make_data
from tests.reference import training as reference

EACH = [([name], 0.6) for name in WEIGHTS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("host", HOSTS)
def test_training_equals_the_equations(host, dtype):
    """Masks are taken after steps 30 and 60, and a last time at the end of the ramp, after step 80."""
    assert_equal_training(
        GMP(0.6, start=1, end=8, update_every_n_steps=30, verbose=False),
        lambda thetas: reference.GMP(thetas, EACH, start=1, end=8, every=30),
        host=host,
        dtype=dtype,
    )


def test_all_weights_compete():
    assert_equal_training(
        GMP(0.6, start=1, end=8, distribution="global", update_every_n_steps=1, verbose=False),
        lambda thetas: reference.GMP(thetas, [(WEIGHTS, 0.6)], start=1, end=8),
    )


def test_clipping_sees_the_masked_gradient():
    assert_equal_training(
        GMP(0.6, start=1, end=8, update_every_n_steps=10, verbose=False),
        lambda thetas: reference.GMP(thetas, EACH, start=1, end=8, every=10),
        clip=0.3,
    )


@pytest.mark.parametrize("distribution", ["global", "uniform"])
def test_pruned_weights_do_not_come_back(distribution):
    """Not even those that the optimizer still moves, by as much as the largest weights, because of past gradients."""
    callback = GMP(0.6, start=0, end=10, distribution=distribution, update_every_n_steps=1, verbose=False)
    masks = []
    probe = LambdaCallback(
        on_train_batch_end=lambda *_: masks.append(torch.cat([callback.mask(name).flatten() for name in WEIGHTS]))
    )
    make_trainer(callback, probe, max_epochs=EPOCHS).fit(Net(host(torch.optim.AdamW, 0.05)), make_data())
    assert len(masks) == 120
    returned = [int((later & ~earlier).sum()) for earlier, later in itertools.pairwise(masks)]
    assert sum(returned) == 0, returned


def test_own_budgets():
    assert_equal_training(
        GMP(
            0.6,
            start=1,
            end=8,
            update_every_n_steps=10,
            overrides={"stem": {"sparsity": 0.3}, "head.weight": None},
            verbose=False,
        ),
        lambda thetas: reference.GMP(
            thetas, [(["depthwise.weight"], 0.6), (["grouped.weight"], 0.6), (["stem.weight"], 0.3)],
            start=1, end=8, every=10,
        ),
    )  # fmt: skip


def test_accumulated_gradients():
    assert_equal_training(
        GMP(0.6, start=1, end=20, update_every_n_steps=7, verbose=False),
        lambda thetas: reference.GMP(thetas, EACH, start=1, end=20, every=7),
        epochs=30,
        accumulate=3,
    )
