"""Dead outputs, vanished layers and masks that do not settle are what plain counting finds, and warned of once."""

import warnings

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_sparse import SET, KeepMask, SparseTraining
from lightning_sparse.engine.watch import dead_outputs
from tests.helpers.models import CLASSES, Classifier, Saver, fit
from tests.helpers.strategies import every_strategy


class Conv1D(nn.Module):
    """As Hugging Face has it: one column per output."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x):
        return x @ self.weight


def silent(layer, *shape):
    """Outputs of a layer that are zero for any input."""
    output = layer(torch.randn(*shape)).transpose(0, 1).flatten(1)
    return int((output == 0).all(1).sum()), len(output)


LAYERS = {
    "linear": (nn.Linear(5, 16, bias=False), (9, 5), 0, 1),
    "grouped": (nn.Conv2d(6, 16, 3, groups=2, bias=False), (9, 6, 5, 5), 0, 1),
    "transposed": (nn.ConvTranspose2d(3, 16, 2, bias=False), (9, 3, 4, 4), 1, 1),
    "transposed-grouped": (nn.ConvTranspose1d(6, 16, 2, groups=2, bias=False), (9, 6, 4), 1, 2),
    "hugging-face": (Conv1D(5, 16), (9, 5), 1, 1),
}


@pytest.mark.parametrize("name", LAYERS)
def test_dead_outputs_are_those_that_stay_zero(name):
    layer, shape, dim, groups = LAYERS[name]
    for keep in (0.05, 0.1, 0.3):
        mask = torch.rand(layer.weight.shape) < keep
        with torch.no_grad():
            layer.weight.copy_(torch.randn(mask.shape) * mask)
        assert dead_outputs(mask, dim, groups) == silent(layer, *shape)
        assert silent(layer, *shape)[1] == 16


class Zoo(Classifier):
    """A layer of each kind."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(
            nn.Sequential(
                nn.Conv2d(1, 6, 3),
                nn.ConvTranspose2d(6, 8, 2, groups=2),
                nn.Flatten(),
                Conv1D(200, 12),
                nn.Linear(12, CLASSES),
            ),
            "adamw",
        )


def count(callback):
    """Dead outputs by loops over single outputs."""
    first, second, third, fourth = (callback.mask(name) for name in callback.targets)
    return {
        callback.targets[0]: sum(not first[i].any() for i in range(6)),
        callback.targets[1]: sum(not second[3 * g : 3 * g + 3, j].any() for g in range(2) for j in range(4)),
        callback.targets[2]: sum(not third[:, j].any() for j in range(12)),
        callback.targets[3]: sum(not fourth[i].any() for i in range(CLASSES)),
    }


class Follow(Callback):
    """Keeps masks at the ends of epochs, and what is logged there."""

    def __init__(self, sparse):
        self.sparse, self.masks, self.logged, self.dead = sparse, [], [], []

    def on_train_epoch_end(self, trainer, pl_module):
        self.masks.append({name: self.sparse.mask(name).clone() for name in self.sparse.targets})
        self.dead.append(count(self.sparse))

    def on_train_epoch_start(self, trainer, pl_module):
        self.keep(trainer)

    def on_fit_end(self, trainer, pl_module):
        self.keep(trainer)

    def keep(self, trainer):
        if self.masks:
            self.logged.append({key: float(value) for key, value in trainer.callback_metrics.items()})


@pytest.mark.filterwarnings("ignore:.*has pruned all:UserWarning")
@pytest.mark.parametrize(
    "callback",
    [
        SparseTraining(0.9, end=3, log_layers=True, verbose=False),
        SET(0.9, update_every_n_steps=1, log_layers=True, verbose=False),
    ],
    ids=["ramp", "SET"],
)
def test_what_is_logged_is_what_plain_counting_gives(callback):
    follow = Follow(callback)
    fit(Zoo(), callback, follow, max_epochs=5)
    assert sum(sum(dead.values()) for dead in follow.dead) > 0
    for epoch, logged in enumerate(follow.logged):
        found = {key.removeprefix("dead_outputs/"): n for key, n in logged.items() if key.startswith("dead_outputs/")}
        assert found == follow.dead[epoch]
        for name, mask in follow.masks[epoch].items():
            if epoch:
                before = follow.masks[epoch - 1][name]
                overlap = sum(map(min, mask.flatten().tolist(), before.flatten().tolist()))
                union = sum(map(max, mask.flatten().tolist(), before.flatten().tolist()))
                assert logged[f"mask_overlap/{name}"] == pytest.approx(overlap / max(1, union) if union else 1.0)
            else:
                assert f"mask_overlap/{name}" not in logged
    assert {row.name: row.dead_outputs for row in callback.report().rows if row.treated} == follow.dead[-1]
    assert {row.dead_outputs for row in callback.report().rows if not row.treated} == {None}


def caught(callback, model=None, **flags):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fit(model or Zoo(), callback, **flags)
    return [str(warning.message) for warning in found if f"`{type(callback).__name__}`" in str(warning.message)]


def zeroed(**rows):
    """A network in which some outputs of some layers have no weights."""
    model = Zoo()
    with torch.no_grad():
        model.net[0].weight[: rows.get("conv", 0)] = 0.0
        model.net[1].weight[:3, : rows.get("transposed", 0)] = 0.0
        model.net[3].weight[:, : rows.get("hugging_face", 0)] = 0.0
        model.net[4].weight[0, 0] = 0.0
    return model


def test_layers_of_which_most_outputs_are_dead_are_warned_of_once():
    model = zeroed(conv=4, transposed=4, hugging_face=6)  # four of six, four of eight, six of twelve
    assert caught(KeepMask(verbose=False), model) == [
        "`KeepMask` has pruned all weights of 4 of the 6 outputs of `net.0.weight`, which are dead. Leave it dense with"
        " `ignore`, or give it a budget with `overrides`."
    ]


class Vanishing(SparseTraining):
    """First the first layer loses most outputs, then all."""

    def select(self, latents, sparsity, context):
        masks = super().select(latents, sparsity, context)
        masks[0]["mask"][: 4 if context.position < 1.5 else 6] = False
        return masks


def test_a_layer_that_vanishes_is_warned_of_once_more():
    remedy = " Leave it dense with `ignore`, or give it a budget with `overrides`."
    messages = caught(Vanishing(0.3, end=0.2, verbose=False), max_epochs=5)
    assert [message for message in messages if "net.0.weight" in message] == [
        f"`Vanishing` has pruned all weights of 4 of the 6 outputs of `net.0.weight`, which are dead.{remedy}",
        f"`Vanishing` has pruned all 54 weights of `net.0.weight`.{remedy}",
    ]


class Restless(SparseTraining):
    """Keeps other weights each time."""

    keeps_latent = True

    def select(self, latents, sparsity, context):
        return [{"mask": torch.rand(latent.theta.shape, generator=context.generator) > sparsity} for latent in latents]

    @property
    def target_reached(self):
        return self._context().progress >= 1.0


def test_masks_that_do_not_settle_are_warned_of_once():
    unsettled = [m for m in caught(Restless(0.5, end=2, verbose=False), max_epochs=6) if "settle" in m]
    assert len(unsettled) == 1
    assert unsettled[0].startswith("`Restless` does not settle on what it keeps: its masks at the ends of epochs 1 and")
    assert not any("settle" in m for m in caught(Restless(0.5, end=2, verbose=False), max_epochs=2))  # ramp not over


@every_strategy
def test_published_methods_settle(setting):
    assert not [message for message in caught(setting.build(), Classifier(), max_epochs=6) if "settle" in message]


@pytest.mark.filterwarnings("ignore:.*has pruned all:UserWarning")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
@pytest.mark.parametrize("checkpoint", ["epoch=0", "step=5", "step=7"])
@pytest.mark.parametrize("method", [SparseTraining, SET])
def test_resumed_overlaps_are_those_of_the_uninterrupted_run(method, checkpoint):
    def run(**kwargs):
        callback = method(0.9, end=1.0, update_every_n_steps=1, log_layers=True, verbose=False)
        saver = [] if kwargs else [Saver()]
        fit(Zoo(), callback, *saver, max_epochs=2, **kwargs)
        return callback.metrics(), callback.state_dict()["watch"]

    metrics, watch = run()
    resumed, rewatched = run(ckpt_path=f"{checkpoint}.ckpt")
    assert resumed == metrics
    assert rewatched == watch
    assert 0 < sum(watch["overlap"].values()) < len(watch["overlap"])
    saved = torch.load(f"{checkpoint}.ckpt", weights_only=True)["callbacks"]
    (state,) = [entry["watch"] for entry in saved.values() if "watch" in entry]
    assert bool(state["masks"]) == checkpoint.startswith("step")  # else they are those of now
