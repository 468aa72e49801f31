"""MEST against a plain loop that prunes and grows by full sorts."""

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback

from lightning_sparse import MEST
from lightning_sparse.engine.latent import Context
from tests.helpers.models import make_trainer
from tests.helpers.side_by_side import EPOCHS, HOSTS, WEIGHTS, Net, assert_equal_training, make_data
from tests.reference import sparse_to_sparse as reference

EACH = dict.fromkeys(WEIGHTS, 0.6)
MUTATION = {0: 0.1, 5: 0.05, 9: 0.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variant", ["EM", "EM&S"])
@pytest.mark.parametrize("host", HOSTS)
def test_training_equals_the_equations(host, variant, dtype):
    """The last update before step 90 comes after step 84; then the mask is pruned for good."""
    assert_equal_training(
        MEST(0.6, variant=variant, mutation=MUTATION, update_every_n_steps=7, seed=4, verbose=False),
        lambda thetas: reference.MEST(thetas, EACH, mutation=MUTATION, soft=variant == "EM&S", every=7, seed=4),
        host=host,
        dtype=dtype,
    )


@pytest.mark.parametrize("variant", ["EM", "EM&S"])
def test_gradients_count(variant):
    callback = MEST(0.6, variant=variant, mutation=MUTATION, grad_weight=2.0, update_every_n_steps=7, verbose=False)
    assert_equal_training(
        callback,
        lambda thetas: reference.MEST(thetas, EACH, mutation=MUTATION, soft=variant == "EM&S", every=7, weight=2.0),
    )


def test_forgetting_momentum():
    def make(thetas):
        twin = reference.MEST(thetas, EACH, mutation=MUTATION, soft=False, every=7)
        twin.reset = True
        return twin

    callback = MEST(0.6, mutation=MUTATION, update_every_n_steps=7, reset_optimizer_state=True, verbose=False)
    assert_equal_training(callback, make, host="adamw")


@pytest.mark.parametrize(("variant", "peak"), [("EM", 0.0), ("EM&S", 1.0)])
def test_densities_between_updates(variant, peak):
    """Fractions of the training serve as moments, too."""
    callback = MEST(
        0.6, variant=variant, mutation={0.0: 0.1, 0.5: 0.05, 0.75: 0.0}, update_every_n_steps=10, verbose=False
    )
    pruned = []
    probe = LambdaCallback(on_train_batch_end=lambda *_: pruned.append(int((~callback.mask("head.weight")).sum())))
    make_trainer(callback, probe, max_epochs=EPOCHS).fit(Net(HOSTS["sgd"]), make_data())
    # 240 weights; the ratio that holds is that of the batch: 0.05 is reached with the last of the sixth epoch.
    moved = [0] * 9 + [24] * 50 + [12] * 30 + [0] * 31
    assert pruned == [144 - int(peak * extra) for extra in moved]


def test_gradients_stay_sparse():
    callback = MEST(0.9, grad_weight=1.0, update_every_n_steps=10)
    assert callback.gradient_density(0.2, Context(10, 0, 10, 0.5)) == 0.2


@pytest.mark.parametrize(
    ("mutation", "message"),
    [
        ({}, "`mutation` to end with 0"),
        ({0: 0.1}, "`mutation` to end with 0"),
        ({0: 0.1, 5: 0.05}, "`mutation` to end with 0"),
        ({0: 1.0, 5: 0.0}, "to lie in"),
        ({5: 0.1, 0: 0.0}, "no earlier"),
        ({0.0: 0.1, 1.5: 0.0}, "fraction of training"),
    ],
)
def test_bad_mutation(mutation, message):
    with pytest.raises(ValueError, match=message):
        MEST(mutation=mutation)
