"""S-STE against the equations."""

import pytest
import torch

from lightning_sparse import SSTE
from lightning_sparse.functional import group_soft_threshold, parse_pattern
from tests.helpers.side_by_side import WEIGHTS, assert_equal_training, hosts_and_dtypes
from tests.reference.functional import groups
from tests.reference.training import Method


def soft(theta, kept, of):
    """Group by group."""
    out = torch.zeros_like(theta)
    for members in groups(theta.shape, f"{kept}:{of}").values():
        tau = sorted(abs(float(theta[where])) for where in members)[of - kept - 1]
        for where in members:
            out[where] = theta[where].sign() * max(abs(float(theta[where])) - tau, 0.0)
    return out


class Groups(Method):
    def __init__(self, thetas, names, *, kept, of, decay):
        super().__init__(thetas, [(names, None)])
        self.kept, self.of, self.decay, self.scale = kept, of, decay, {}
        for name in names:
            theta = self.latent(name)
            shrunk = soft(theta, kept, of)
            self.scale[name] = (theta * shrunk).sum() / (shrunk * shrunk).sum()

    def shown(self, name, theta):
        return theta + (self.weight(name) - theta).detach()

    def penalty(self):
        if not self.decay:
            return 0.0
        return sum(self.decay / 2 * (self.thetas[name] * ~self.mask(name)).square().sum() for name in self.names)

    def weight(self, name):
        return self.scale[name] * soft(self.latent(name), self.kept, self.of)

    def mask(self, name):
        return soft(self.latent(name), self.kept, self.of) != 0

    def threshold(self, name):
        return None


@pytest.mark.parametrize("decay", [0.0, 0.05])
@hosts_and_dtypes
def test_training_equals_the_equations(host, dtype, decay):
    assert_equal_training(
        SSTE(masked_decay=decay, verbose=False),
        lambda thetas: Groups(thetas, WEIGHTS[2:], kept=2, of=4, decay=decay),
        host=host,
        dtype=dtype,
    )


def test_other_numbers():
    assert_equal_training(
        SSTE("1:2", verbose=False), lambda t: Groups(t, [WEIGHTS[0], *WEIGHTS[2:]], kept=1, of=2, decay=0.0)
    )


@pytest.mark.parametrize(
    ("kept", "of", "shape"), [(2, 4, (3, 8)), (1, 4, (2, 4, 3)), (3, 4, (5, 12, 1, 1)), (1, 2, (4, 2))]
)
def test_soft_thresholds_of_groups(kept, of, shape):
    theta = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(group_soft_threshold(theta, parse_pattern(f"{kept}:{of}")), soft(theta, kept, of))


def test_of_equal_weights_none_is_left_and_the_function_is_continuous():
    pattern = parse_pattern("2:4")
    assert not group_soft_threshold(torch.ones(2, 4), pattern).any()
    near, far = torch.tensor([[1.0, 2.0, 3.0, 2.0 + 1e-6]]), torch.tensor([[1.0, 2.0, 3.0, 2.0 - 1e-6]])
    difference = group_soft_threshold(near, pattern) - group_soft_threshold(far, pattern)
    assert difference.abs().max() < 1e-5


@pytest.mark.parametrize("pattern", ["channel", "block:2x2", "4:2"])
def test_other_patterns_are_refused(pattern):
    with pytest.raises(ValueError, match="Expected argument `pattern` to be"):
        SSTE(pattern)
