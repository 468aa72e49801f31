"""S-LATS against the equations."""

import torch

from lightning_sparse import LATS
from lightning_sparse.engine.latent import Context, Latent
from tests.helpers.side_by_side import EPOCHS, WEIGHTS, assert_equal_training, hosts_and_dtypes
from tests.helpers.spent import assert_spent
from tests.reference import dense_gradients as reference


@hosts_and_dtypes
def test_training_equals_the_equations(host, dtype):
    assert_equal_training(
        LATS(0.1, verbose=False),
        lambda thetas: reference.LATS(thetas, WEIGHTS, final=0.1, epochs=EPOCHS),
        host=host,
        dtype=dtype,
    )


def test_the_threshold_moves_as_the_sum_of_a_cosine_learning_rate():
    """Its steps are in proportion to the learning rate, so that the L1 penalty that it stands for is constant."""
    steps, final = 1000, 0.3
    callback = LATS(final)
    rates = torch.tensor([(1 + torch.cos(torch.tensor(torch.pi * (n - 0.5) / steps))) for n in range(1, steps + 1)])
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    latent = Latent("w", "w", weight, weight.detach().clone())
    found = [
        float(callback.select([latent], None, Context(n, 0, 1, n / steps))[0]["threshold"]) for n in range(1, steps + 1)
    ]
    expected = final * rates.double().cumsum(0) / rates.double().sum()
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected, rtol=0, atol=1e-6)


def test_flops():
    assert_spent(LATS(0.1, verbose=False), lambda step, density: 1.0)
