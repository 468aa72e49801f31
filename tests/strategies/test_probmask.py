"""ProbMask against autograd through its samples, given the same noise."""

import pytest
import torch

from lightning_sparse import ProbMask
from lightning_sparse.functional import budget_shift, likeliest_masks, relaxed_mask, relaxed_mask_gradient
from tests.helpers.models import make_trainer
from tests.helpers.side_by_side import HOSTS, WEIGHTS, Net, assert_equal_training, hosts_and_dtypes, make_data
from tests.helpers.spent import assert_spent
from tests.reference import stochastic as reference

EACH = [([name], 0.6) for name in WEIGHTS]
WHEN = {"start": 2, "end": 7, "freeze": 10}


def twin(pools=((WEIGHTS, 0.6),), **settings):
    return lambda thetas: reference.ProbMask(thetas, list(pools), **{**WHEN, "score_lr": 6e-3, **settings})


@hosts_and_dtypes
def test_training_equals_autograd(host, dtype):
    assert_equal_training(ProbMask(0.6, **WHEN, verbose=False), twin(), host=host, dtype=dtype)


def test_one_sample_is_shared_by_a_window():
    when = {**WHEN, "freeze": 12}  # else in the middle of a window
    callback = ProbMask(0.6, **when, distribution="uniform", score_lr=0.05, verbose=False)
    assert_equal_training(callback, twin(EACH, **when, score_lr=0.05), accumulate=3, clip=0.3)


def test_training_without_fine_tuning_equals_autograd():
    callback = ProbMask(0.6, start=1, end=6, freeze=12, score_lr=0.05, verbose=False)
    assert_equal_training(callback, twin(start=1, end=6, freeze=12, score_lr=0.05))
    for latent in callback._weights.latents.values():
        p = latent.state["p"].detach()
        assert float(p.min()) >= 0
        assert float(p.max()) <= 1
    sizes = [latent.theta.numel() for latent in callback._weights.latents.values()]
    total = sum(float(latent.state["p"].detach().sum()) for latent in callback._weights.latents.values())
    assert total <= sum(sizes) - round(0.6 * sum(sizes)) + 1e-9


def test_layers_that_their_share_leaves_dense():
    """Their probabilities have no budget, and yet stay probabilities."""
    callback, net = (
        ProbMask(0.1, start=0, end=0, freeze=12, distribution="er", score_lr=0.05, verbose=False),
        Net(HOSTS["sgd"]),
    )
    make_trainer(callback, max_epochs=3).fit(net, make_data())
    for name, latent in callback._weights.latents.items():
        assert latent.state["p"].min() >= 0.0
        assert latent.state["p"].max() <= 1.0
        assert net.get_parameter(name).isfinite().all()
    assert any(callback.mask(name).all() for name in WEIGHTS)
    assert not all(callback.mask(name).all() for name in WEIGHTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 3.0, 33.0])
def test_the_mask_and_its_gradient(dtype, temperature):
    """Noise as the authors draw it, from two uniform numbers, differentiated by autograd."""
    p = torch.cat([torch.rand(500, dtype=dtype), torch.tensor([0.0, 1.0, 1e-12, 1 - 1e-6], dtype=dtype)])
    p.requires_grad_()
    one, other = torch.rand(2, 504).clamp_(1e-6).double()
    uniform = other.log() / (one.log() + other.log())  # of which the logit is the difference of their noises
    noise = -torch.log(one.log() / other.log()).to(dtype)
    expected = torch.sigmoid((torch.log(p + 1e-20) - torch.log(1 - p + 1e-20) + noise) * temperature)
    found = relaxed_mask(p.detach(), uniform.to(dtype), temperature)
    close = {"rtol": 1e-3, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
    inner = (uniform > 2**-24) & (uniform < 1 - 2**-23)
    torch.testing.assert_close(found[inner], expected.detach()[inner], **close)
    grad = torch.randn(504, dtype=dtype)
    expected.backward(grad)
    heard = relaxed_mask_gradient(grad, expected.detach(), p.detach(), temperature)
    torch.testing.assert_close(heard, p.grad, rtol=1e-4 if dtype == torch.float32 else 1e-12, atol=1e-12)


def test_samples_are_finite_whatever_is_drawn():
    extremes = torch.tensor([0.0, 2.0**-24, 0.5, 1 - 2.0**-24])
    for p in (0.0, 1e-30, 0.5, 1.0):
        for temperature in (1.0, 1 / 0.03):
            mask = relaxed_mask(torch.full((4,), p), extremes, temperature)
            assert ((mask >= 0) & (mask <= 1)).all()
            assert relaxed_mask_gradient(torch.ones(4), mask, torch.full((4,), p), temperature).isfinite().all()
    assert relaxed_mask(torch.ones(4), extremes, 1.0).eq(1).all()


@pytest.mark.parametrize("kept", [1, 7, 30, 59])
def test_the_projection_is_the_nearest_point_on_budget(kept):
    """Compared with what Dykstra's alternating projections converge to."""
    ps = [torch.rand(20, dtype=torch.float64) * 1.2 - 0.1, torch.ones(40, dtype=torch.float64)]
    shift = budget_shift(ps, kept)
    found = torch.cat([(p - shift).clamp(0, 1) for p in ps])
    x, correction = torch.cat(ps), torch.zeros(60, dtype=torch.float64)
    if float(x.clamp(0, 1).sum()) > kept:
        for _ in range(20000):
            plane = x - max(0.0, (float(x.sum()) - kept) / 60)
            x, correction = (plane + correction).clamp(0, 1), plane + correction - (plane + correction).clamp(0, 1)
        assert float(found.sum()) == pytest.approx(kept, abs=1e-9)
        torch.testing.assert_close(found, x, rtol=0, atol=1e-6)


def test_probabilities_on_budget_stay():
    assert budget_shift([torch.full((10,), 0.3)], 4) == 0.0
    assert budget_shift([torch.tensor([1.006, -0.006])], 1) == 0.0


def test_the_likeliest_mask_by_hand():
    ps = [torch.tensor([1.0, 0.5, 0.5]), torch.tensor([[0.5], [0.0]])]
    thetas = [torch.tensor([0.0, 1.0, -3.0]), torch.tensor([[2.0], [9.0]])]
    masks = [likeliest_masks(ps, thetas, k) for k in range(6)]
    kept = [torch.cat([mask.flatten() for mask in pair]).nonzero().flatten().tolist() for pair in masks]
    assert kept == [[], [0], [0, 2], [0, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3, 4]]


def test_flops():
    """Dense as long as masks are sampled, then those of the kept weights."""
    callback = ProbMask(0.6, start=1, end=5, freeze=7, verbose=False)
    assert_spent(callback, lambda step, density: 3.0 - 2.0 * density if step <= 42 else density)


def test_numbers_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="Expected argument `score_lr` to be a finite number >= 0, but got -1"):
        ProbMask(score_lr=-1)
