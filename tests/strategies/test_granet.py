"""GraNet against a plain loop that prunes, drops and grows by full sorts."""

import pytest
import torch

from lightning_sparse import GraNet
from lightning_sparse.engine.latent import Context
from tests.helpers.side_by_side import EPOCHS, HOSTS, WEIGHTS, Net, assert_equal_training
from tests.reference import sparse_to_sparse as reference

SHAPES = [parameter.shape for name, parameter in Net(None).named_parameters() if name in WEIGHTS]


def twin(initial=0.0, epochs=EPOCHS, **settings):
    shares = reference.erdos_renyi(SHAPES, initial) if initial else [0.0] * len(WEIGHTS)
    sparsities = dict(zip(WEIGHTS, shares, strict=True))
    return lambda thetas: reference.GraNet(thetas, sparsities, initial=initial, epochs=epochs, final=0.7, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("host", HOSTS)
def test_from_a_dense_start(host, dtype):
    """Growth goes on after the ramp, which ends after step 80."""
    callback = GraNet(0.7, start=1, end=8, update_every_n_steps=7, verbose=False)
    assert_equal_training(callback, twin(start=1, end=8, every=7), host=host, dtype=dtype)
    assert callback.target_reached
    size = sum(shape.numel() for shape in SHAPES)
    assert sum(int((~callback.mask(name)).sum()) for name in WEIGHTS) == round(0.7 * size)


@pytest.mark.parametrize("host", HOSTS)
def test_from_a_sparse_start(host):
    assert_equal_training(
        GraNet(0.7, end=8, initial_sparsity=0.5, drop_fraction=0.3, update_every_n_steps=11, seed=2, verbose=False),
        twin(0.5, end=8, every=11, fraction=0.3, seed=2),
        host=host,
    )


def test_accumulated_and_clipped_gradients():
    assert_equal_training(
        GraNet(0.7, end=20, update_every_n_steps=8, verbose=False),
        twin(end=20, every=8, epochs=30),
        epochs=30,
        accumulate=3,
        clip=0.3,
    )


def test_the_target_is_reached_between_updates():
    """The last update before `end` comes after step 50; at step 80 only the ramp is finished."""
    callback = GraNet(0.7, end=8, update_every_n_steps=50, verbose=False)

    class Last(reference.GraNet):
        def after_step(self, epoch, batch, batches):
            super().after_step(epoch, batch, batches)
            if (epoch + 1, batch) == (self.end, batches):
                scores = [self.thetas[name].abs() + self.masks[name] for name in self.names]
                size = sum(score.numel() for score in scores)
                masks = reference.largest(scores, size - round(self.final * size))
                self.masks.update(zip(self.names, masks, strict=True))
                for name in self.names:
                    self.thetas[name].data.mul_(self.masks[name])

    assert_equal_training(
        callback,
        lambda thetas: Last(thetas, dict.fromkeys(WEIGHTS, 0.0), epochs=EPOCHS, final=0.7, end=8, every=50),
    )


def test_dense_gradients_are_paid_for_when_they_are_read():
    callback = GraNet(0.9, update_every_n_steps=10)
    for step, progress, needed in [(9, 0.5, 0.2), (10, 0.5, 1.0), (10, 0.0, 0.2), (20, 1.0, 1.0)]:
        assert callback.gradient_density(0.2, Context(step, 0, 10, progress)) == needed
