"""STR against autograd through its equation, thresholds in a parameter group of their own."""

import pytest
import torch

from lightning_sparse import STR
from lightning_sparse.engine.latent import Context, Latent
from tests.helpers.side_by_side import HOSTS, WEIGHTS, assert_equal_training
from tests.reference import training as reference

ALL = [(WEIGHTS, None)]
SETTINGS = {"threshold_init": -2.5, "threshold_weight_decay": 3e-3}


def twin(names=WEIGHTS):
    return lambda thetas: reference.STR(thetas, [(names, None)], init=-2.5, weight_decay=3e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("host", HOSTS)
def test_training_equals_autograd(host, dtype):
    assert_equal_training(STR(**SETTINGS, verbose=False), twin(), host=host, dtype=dtype)


@pytest.mark.parametrize("host", ["nesterov", "adamw"])
def test_accumulated_gradients(host):
    assert_equal_training(STR(**SETTINGS, verbose=False), twin(), host=host, epochs=25, accumulate=3)


def test_thresholds_are_clipped_by_a_norm_of_their_own():
    assert_equal_training(STR(**SETTINGS, verbose=False), twin(), clip=0.005)


def test_dense_weights_have_no_threshold():
    assert_equal_training(STR(**SETTINGS, ignore=["head"], verbose=False), twin(WEIGHTS[:-1]))


def test_gradients_by_hand():
    # sigmoid(0) = 1/2 keeps 1 and 0.8, not 0.5 itself; sigmoid'(0) = 1/4.
    # dL/ds = -1/4 (1 sign(1) + 5 sign(0.8)) = -1.5, the gradients at pruned weights are dropped.
    callback, theta = STR(threshold_init=0.0), torch.tensor([[1.0, -0.5, 0.2], [-0.1, 0.8, -0.3]])
    latent, now = Latent("w", "w", torch.empty(2, 3), theta, callback.init_state(theta)), Context(0, 0, 1, 1.0)
    latent.select(callback.select([latent], None, now)[0])
    callback.project(latent, now, out := torch.empty(2, 3))
    torch.testing.assert_close(out, torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.3, 0.0]]))
    grad = callback.pull_back(latent, torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), now)
    assert torch.equal(grad, torch.tensor([[1.0, 0.0, 0.0], [0.0, 5.0, 0.0]]))
    assert latent.state["s"].grad == -1.5
