"""AutoSparse against autograd through a relu with a proxy derivative."""

import pytest
import torch

from lightning_sparse import STR, AutoSparse
from lightning_sparse.engine.latent import Context, Latent
from lightning_sparse.strategies.annealing import annealed_alpha
from tests.helpers.models import make_trainer
from tests.helpers.side_by_side import (
    EPOCHS,
    HOSTS,
    WEIGHTS,
    Net,
    assert_equal_training,
    hosts_and_dtypes,
    make_data,
)
from tests.reference import training as reference
from tests.reference.functional import gradient_annealing_decay

THRESHOLDS = {"threshold_init": -2.5, "threshold_weight_decay": 3e-3}


def twin(*, alpha=0.6, reset=9, epochs=EPOCHS, **settings):
    return lambda thetas: reference.AutoSparse(
        thetas, [(WEIGHTS, None)], init=-2.5, weight_decay=3e-3, alpha=alpha, reset=reset, epochs=epochs, **settings
    )


@pytest.mark.parametrize("in_threshold", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("host", HOSTS)
def test_training_equals_autograd(host, dtype, in_threshold):
    assert_equal_training(
        AutoSparse(alpha=0.6, alpha_reset=9, alpha_in_threshold=in_threshold, **THRESHOLDS, verbose=False),
        twin(alpha_in_threshold=in_threshold),
        host=host,
        dtype=dtype,
    )


@pytest.mark.parametrize(("alpha_reset", "epoch"), [(4, 4), (0.75, 9), (0.7, 9), (0.0, 0), (None, None)])
def test_the_moment_at_which_alpha_becomes_zero(alpha_reset, epoch):
    assert_equal_training(
        AutoSparse(alpha=0.6, alpha_reset=alpha_reset, **THRESHOLDS, verbose=False), twin(reset=epoch)
    )


@pytest.mark.parametrize("in_threshold", [True, False])
@pytest.mark.parametrize("backward_sparsity", [0.3, 0.9])
def test_backward_sparsity(backward_sparsity, in_threshold):
    assert_equal_training(
        AutoSparse(
            alpha=0.6,
            alpha_reset=9,
            alpha_in_threshold=in_threshold,
            backward_sparsity=backward_sparsity,
            **THRESHOLDS,
            verbose=False,
        ),
        twin(alpha_in_threshold=in_threshold, backward_sparsity=backward_sparsity),
    )


def test_accumulated_gradients():
    assert_equal_training(
        AutoSparse(alpha=0.6, alpha_reset=20, **THRESHOLDS, verbose=False),
        twin(reset=20, epochs=25),
        epochs=25,
        accumulate=3,
    )


@pytest.mark.parametrize("method", [STR, lambda **settings: AutoSparse(alpha=0.0, **settings)])
def test_without_alpha_it_is_str(method):
    assert_equal_training(method(**THRESHOLDS, verbose=False), twin(alpha=0.0))


def test_alpha_is_that_of_the_epoch_and_zero_from_the_reset_on():
    def alpha_in(epoch, reset, epochs=100):
        return annealed_alpha(0.5, reset, Context(step=0, epoch=epoch, epochs=epochs, progress=0.3))

    assert [alpha_in(e, None) for e in range(101)] == pytest.approx(
        [0.5 * gradient_annealing_decay(e / 100) for e in range(101)]
    )
    # A fraction of training means the epoch that it names, although 0.55 * 100 is a little more than 55.
    for percent in range(1, 100):
        assert alpha_in(percent - 1, percent / 100) > 0
        assert alpha_in(percent, percent / 100) == alpha_in(percent, percent) == 0


@pytest.mark.parametrize(("in_threshold", "pull"), [(True, 1.5), (False, 6.0)])
def test_gradients_by_hand(in_threshold, pull):
    # sigmoid(0) = 1/2 keeps 1 and 0.8; the others hear half of their gradients in epoch 0, where the decay is 1.
    # With alpha in it, dL/ds = -1/4 (1 - 1 + 1.5 - 2 + 5 - 3) = -1.5/4; else the kept say -1/4 (1 + 5) = -6/4.
    callback = AutoSparse(alpha=0.5, threshold_init=0.0, alpha_in_threshold=in_threshold)
    theta = torch.tensor([[1.0, -0.5, 0.2], [-0.1, 0.8, -0.3]])
    latent, now = Latent("w", "w", torch.empty(2, 3), theta, callback.init_state(theta)), Context(0, 0, 10, 1.0)
    latent.select(callback.select([latent], None, now)[0])
    grad = callback.pull_back(latent, torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), now)
    assert torch.equal(grad, torch.tensor([[1.0, 1.0, 1.5], [2.0, 5.0, 3.0]]))
    assert latent.state["s"].grad == -pull / 4


# --- with a budget ---------------------------------------------------------------------------------------------------


def budgeted_twin(*, reset=9, **settings):
    settings = {"init": -2.5, "weight_decay": 3e-3, "alpha": 0.6, "start": 2, "end": 8, "epochs": EPOCHS} | settings
    return lambda thetas: reference.BudgetedAutoSparse(thetas, [(WEIGHTS, 0.6)], reset=reset, **settings)


@pytest.mark.parametrize("backward_sparsity", [None, 0.5])
@hosts_and_dtypes
def test_training_with_a_budget_equals_autograd(host, dtype, backward_sparsity):
    assert_equal_training(
        AutoSparse(
            0.6,
            alpha=0.6,
            alpha_reset=9,
            start=2,
            end=8,
            backward_sparsity=backward_sparsity,
            **THRESHOLDS,
            verbose=False,
        ),
        budgeted_twin(backward_sparsity=backward_sparsity),
        host=host,
        dtype=dtype,
    )


@pytest.mark.parametrize("budget", [{"sparsity": 0.6}, {"parameters": 300}])
def test_it_ends_exactly_on_target_with_thresholds_that_differ_as_learned(budget):
    callback = AutoSparse(**budget, alpha=0.6, start=2, end=8, threshold_init=-2.5, verbose=False)
    net = Net(HOSTS["sgd"])
    make_trainer(callback, max_epochs=EPOCHS).fit(net, make_data())
    size = sum(net.get_parameter(name).numel() for name in WEIGHTS)
    kept = sum(int((net.get_parameter(name) != 0).sum()) for name in WEIGHTS)
    rest = sum(parameter.numel() for parameter in net.parameters()) - size
    wanted = size - 0.6 * size if "sparsity" in budget else 300 - rest
    assert abs(kept - wanted) < 1
    learned = {name: float(callback._weights.latents[name].state["s"].detach().sigmoid()) for name in WEIGHTS}
    factors = [callback.threshold(name) / learned[name] for name in WEIGHTS]
    assert factors == pytest.approx([factors[0]] * len(factors))
    assert len({round(sigma, 5) for sigma in learned.values()}) == len(WEIGHTS)
    assert max(learned.values()) > 1.0005 * min(learned.values())
    assert callback.target_reached


def test_a_budget_of_zero_thresholds_is_met_all_the_same():
    callback = AutoSparse(0.5, threshold_init=-3200.0, start=0, end=4, verbose=False)
    make_trainer(callback, max_epochs=6).fit(Net(HOSTS["sgd"]), make_data())
    assert callback.target_reached
