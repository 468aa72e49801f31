"""AC/DC against masks that are taken by a full sort in phases that are written down."""

import itertools
import math

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback

from lightning_sparse import ACDC
from lightning_sparse.engine.clock import Clock
from tests.helpers.models import make_trainer
from tests.helpers.side_by_side import HOSTS, WEIGHTS, Net, assert_equal_training, host, hosts_and_dtypes, make_data
from tests.helpers.spent import BATCHES, assert_spent
from tests.reference import dense_gradients as reference

# A third short phase, from 8 to 9, would leave only one epoch of the dense one.
PHASES = [(2, 3), (5, 6), (10, math.inf)]
MOMENTS = {"start": 2, "end": 10, "sparse_phase": 1, "dense_phase": 2}


@hosts_and_dtypes
def test_training_equals_the_equations(host, dtype):
    assert_equal_training(
        ACDC(0.6, **MOMENTS, verbose=False),
        lambda thetas: reference.ACDC(thetas, [(WEIGHTS, 0.6)], phases=PHASES, reset=True),
        host=host,
        dtype=dtype,
    )


@pytest.mark.parametrize("optimizer", HOSTS)
def test_without_a_reset_in_each_layer(optimizer):
    assert_equal_training(
        ACDC(0.6, **MOMENTS, distribution="uniform", reset_optimizer_state=False, verbose=False),
        lambda thetas: reference.ACDC(thetas, [([n], 0.6) for n in WEIGHTS], phases=PHASES, reset=False),
        host=optimizer,
        clip=0.3,
    )


def test_phases_as_fractions_that_end_within_windows_of_accumulation():
    """12 epochs of 10 batches in windows of 4, 4 and 2."""
    start, sparse, dense, end = 0.2 * 12, 0.1 * 12, 0.15 * 12, 0.85 * 12
    period = sparse + dense
    phases = [(start, start + sparse), (start + period, start + period + sparse), (end, math.inf)]
    assert_equal_training(
        ACDC(0.6, start=0.2, sparse_phase=0.1, dense_phase=0.15, end=0.85, verbose=False),
        lambda thetas: reference.ACDC(thetas, [(WEIGHTS, 0.6)], phases=phases, reset=True),
        accumulate=4,
    )


@pytest.mark.parametrize(
    "moments", [{}, {"start": 10, "end": 85, "sparse_phase": 5, "dense_phase": 5}], ids=["fractions", "epochs"]
)
def test_phases_of_the_authors(moments):
    callback = ACDC(0.9, **moments)
    callback._clock = Clock(100.0, 7.0)
    changes = [e for e in range(1, 101) if callback.is_sparse(float(e)) != callback.is_sparse(e - 1.0)]
    assert changes == [*range(10, 80, 5), 85]
    assert not callback.is_sparse(10 - 1 / 7)
    assert callback.is_sparse(15 - 1 / 7)


def test_masks_stay_within_a_phase_and_zeros_come_back_after_it():
    callback, masks = ACDC(0.6, **MOMENTS, verbose=False), []
    probe = LambdaCallback(
        on_train_batch_end=lambda *_: masks.append(torch.cat([callback.mask(name).flatten() for name in WEIGHTS]))
    )
    targets = []
    other = LambdaCallback(on_train_epoch_end=lambda trainer, _: targets.append(callback.target_sparsity))
    net = Net(host(torch.optim.AdamW, 0.03))
    make_trainer(callback, probe, other, max_epochs=12).fit(net, make_data())
    changes = [step for step, (a, b) in enumerate(itertools.pairwise(masks), 2) if not torch.equal(a, b)]
    assert changes == [20, 30, 50, 60, 100]
    assert targets == [0.6 if epoch in (2, 5, 10, 11, 12) else 0.0 for epoch in range(1, 13)]
    assert not torch.equal(masks[20], masks[50])


@pytest.mark.parametrize("name", ["sparse_phase", "dense_phase"])
def test_phases_without_length_are_refused(name):
    with pytest.raises(ValueError, match=f"Expected argument `{name}` to be longer than nothing, but got 0"):
        ACDC(**{name: 0})


def test_flops():
    """Phases begin after the last step of the epoch before."""
    sparse = {epoch * BATCHES + batch for epoch in (2, 5, 8, 9) for batch in range(BATCHES)}
    assert_spent(
        ACDC(0.6, start=2, end=8, sparse_phase=1, dense_phase=2, verbose=False),
        lambda step, density: density if step in sparse else 1.0,
    )
