"""Deep Rewiring against a plain loop over signs and magnitudes."""

import warnings

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_sparse import DeepRewiring
from lightning_sparse.engine.latent import Context, Latent
from tests.helpers.models import make_trainer
from tests.helpers.side_by_side import HOSTS, WEIGHTS, Net, assert_equal_training, host, make_data
from tests.helpers.spent import assert_spent
from tests.reference import rewiring as reference

EACH = dict.fromkeys(WEIGHTS, 0.6)
HOTTER = {"l1": 0.03, "noise": 0.2}
PLAIN = host(torch.optim.SGD, 0.05)


@pytest.mark.parametrize(
    ("host", "dtype"),
    [(PLAIN, torch.float32), (PLAIN, torch.float64), ("nesterov", torch.float64), ("adamw", torch.float64)],
)
def test_training_equals_the_equations(host, dtype):
    twins = []

    def make(thetas):
        twins.append(reference.DeepRewiring(thetas, EACH, end=11, seed=1, **HOTTER))
        return twins[0]

    assert_equal_training(DeepRewiring(0.6, end=11, seed=1, **HOTTER, verbose=False), make, host=host, dtype=dtype)
    assert len(twins[0].cuts) == 109  # none at the first step of epoch 11
    assert sum(twins[0].cuts) > 20


@pytest.mark.parametrize("settings", [{"l1": 0.0, "noise": 0.2}, {"l1": 0.03, "noise": 0.0}])
def test_without_noise_or_penalty(settings):
    assert_equal_training(
        DeepRewiring(0.6, end=11, **settings, verbose=False),
        lambda thetas: reference.DeepRewiring(thetas, EACH, end=11, **settings),
        host=PLAIN,
        clip=0.3,
    )


class Watch(Callback):
    def __init__(self, sparse):
        self.sparse, self.rows = sparse, []

    def on_train_batch_end(self, trainer, model, *args):
        row = {}
        for name in self.sparse.targets:
            row[name] = self.sparse.mask(name).clone(), model.get_parameter(name).detach().clone()
        self.rows.append(row)


def test_signs_are_those_of_the_initial_weights_and_each_layer_keeps_its_number_of_connections():
    net, callback = Net(PLAIN), DeepRewiring(0.6, **HOTTER, verbose=False)
    with torch.no_grad():
        net.head.weight[:, ::2] = 0.0
    signs, watch = {name: net.get_parameter(name).detach().sign() for name in WEIGHTS}, Watch(callback)
    make_trainer(callback, watch, max_epochs=9).fit(net, make_data())
    made = 0
    for before, after in zip(
        watch.rows, watch.rows[1:-1], strict=False
    ):  # the last step is no longer within the window
        for name in WEIGHTS:
            (old, _), (new, weight) = before[name], after[name]
            assert new.sum() == old.sum() == old.numel() - round(0.6 * old.numel())
            assert not weight[new & ~old].any()
            assert (weight * signs[name] >= 0).all()
            made += int((new & ~old).sum())
    assert made > 100
    once_zero = {float(s) for row in watch.rows for s in row["head.weight"][1][:, ::2].sign().unique()}
    assert once_zero == {-1.0, 0.0, 1.0}  # signs have been drawn


def test_a_connection_at_zero_stays_and_one_beyond_it_is_cut():
    weight = torch.tensor([[0.0, -0.1, 0.1], [0.0, -0.1, 0.1]])
    state = {"mask": torch.ones(2, 3, dtype=torch.bool), "positive": torch.tensor([[True] * 3, [False] * 3])}
    state["mask"][0, 0] = False
    latent, now = Latent("w", "w", weight, None, state), Context(1, 0, 2, 0.5, generator=torch.Generator())
    selection = DeepRewiring(0.5).drop_and_grow(latent, 0.0, now)
    assert not (selection["grown"] & torch.tensor([[False, False, True], [True, True, False]])).any()
    assert selection["mask"].sum() == 5
    assert (selection["mask"] | torch.tensor([[True, True, False], [False, False, True]])).all()


def test_noise_and_penalty_by_hand():
    """Standing still but for the noise and the penalty, with learning rate 0.1 where gradients are zero."""
    callback = DeepRewiring(0.5, l1=0.0, noise=0.01, end=1.0, distribution="uniform", verbose=False)
    net = torch.nn.Linear(300, 300, bias=False, dtype=torch.float64)
    torch.nn.init.constant_(net.weight, 5.0)

    class Flat(Net):
        def __init__(self):
            super().__init__(None)
            self.net = net

        def training_step(self, batch, batch_idx):
            return 0.0 * self.net(torch.ones(1, 300, dtype=torch.float64)).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

    callback.patterns["targets"] = ["net"]
    make_trainer(callback, max_epochs=2).fit(Flat(), make_data())
    moved = net.weight.detach()[callback.mask("net.weight")] - 5.0
    assert float(moved.mean()) == pytest.approx(0.0, abs=1e-4)
    assert float(moved.std()) == pytest.approx(0.1 * 0.01 * 19**0.5, rel=0.02)


@pytest.mark.parametrize("name", ["plain", *HOSTS])
def test_an_optimizer_with_a_memory_is_warned_of_once(name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net = Net({"plain": PLAIN, **HOSTS}[name])
        make_trainer(DeepRewiring(0.6, verbose=False), max_epochs=2).fit(net, make_data())
    said = [
        str(warning.message) for warning in caught if "samples networks only with plain SGD" in str(warning.message)
    ]
    assert len(said) == (name != "plain")


def test_gradients_are_those_of_the_kept_weights():
    assert_spent(DeepRewiring(0.9, verbose=False), lambda step, density: density)
