"""Optimizer state of the kept weights only: less memory while the model runs, and the same training bit for bit."""

import functools
import itertools

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

import lightning_sparse as ls
from lightning_sparse.engine.compact import ELEMENTWISE, CompactState
from lightning_sparse.engine.latent import Latent
from lightning_sparse.functional.sharding import local
from tests.engine.test_scaling import Overflowing, Scaling
from tests.helpers.assertions import assert_same
from tests.helpers.models import (
    OPTIMIZERS,
    Classifier,
    Gan,
    ManualClassifier,
    Saver,
    fit,
    make_trainer,
    outcome,
    run,
    snapshot,
)
from tests.helpers.ranks import SpreadClassifier, keep, spawn
from tests.helpers.ranks import train as train_on_ranks
from tests.helpers.strategies import SETTINGS

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
slow = pytest.mark.slow
FIXED = ("ST3-freeze", "GMP", "LAMP", "ProbMask", "KeepMask", "StaticSparsity")  # whose masks once stay as they are
KINDS = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "amsgrad": functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1, amsgrad=True),
    "centered": functools.partial(torch.optim.RMSprop, lr=0.003, momentum=0.5, centered=True),
    **{kind.__name__: functools.partial(kind, lr=0.01) for kind in ELEMENTWISE},
}
FUSED = (torch.optim.Adagrad, torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)


# -- one optimizer, by hand -------------------------------------------------------------------------------------------


def kernels(kind):
    fused = [{"fused": True}] if kind.func in FUSED else []
    return [{"foreach": False}, {"foreach": True}, *fused]


def step_by_hand(kind, kernel, weights, masks, compact):
    """Dense steps, then steps under the masks; the weights, what is kept of the state, and its size while it waits."""
    random = torch.Generator().manual_seed(1)
    weights = [nn.Parameter(weight.clone(memory_format=torch.preserve_format)) for weight in weights]
    latents = [Latent("", "", weight, None, {"mask": mask}) for weight, mask in zip(weights, masks, strict=True)]
    optimizer, state = kind(weights, **kernel), CompactState()
    for step in range(40):
        if step == 10 and compact:
            state.follow([optimizer], latents)
        for weight, mask in zip(weights, masks, strict=True):
            if step >= 10:
                weight.data.masked_fill_(~mask, 0.0)
            grad = torch.randn(weight.shape, generator=random).to(weight)
            weight.grad = torch.empty_like(weight).copy_(grad * mask if step >= 10 else grad)
        closure = [(), (lambda: None,)][step % 2]  # what Lightning does, and what it does not
        optimizer.step(*closure)
    optimizer.state_dict()  # leaves what it describes
    slots = optimizer.state.get(weights[0], {})
    waiting = {key: slot.numel() for key, slot in slots.items() if torch.is_tensor(slot)}
    state.release()
    kept = [
        {key: slot[mask] if torch.is_tensor(slot) and slot.shape == mask.shape else slot for key, slot in slots.items()}
        for slots, mask in zip([optimizer.state.get(weight, {}) for weight in weights], masks, strict=True)
    ]
    return [weight.detach()[mask] for weight, mask in zip(weights, masks, strict=True)], kept, waiting


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kernel_steps_the_kept_weights_alike(name, dtype):
    weights = [torch.randn(33, 17, dtype=dtype), torch.randn(23, dtype=dtype)]
    weights += [torch.randn(4, 6, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)]
    masks = [torch.rand(weight.shape) < 0.2 for weight in weights]
    masks += [torch.ones(5, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.bool)]
    weights += [torch.randn(mask.shape, dtype=dtype) for mask in masks[3:]]
    for kernel in kernels(KINDS[name]):
        if kernel == {"fused": True} and dtype == torch.bfloat16 and KINDS[name].func is torch.optim.SGD:
            continue  # reads momentum across entries, and moves none of them: pytorch/pytorch#191763
        *expected, full = step_by_hand(KINDS[name], kernel, weights, masks, compact=False)
        *actual, waiting = step_by_hand(KINDS[name], kernel, weights, masks, compact=True)
        assert_same(actual, expected, str(kernel))
        shaped = [key for key, size in full.items() if size == weights[0].numel()]
        assert shaped or name == "SGD"
        assert waiting == full | dict.fromkeys(shaped, int(masks[0].sum()))


def test_state_keeps_a_type_of_its_own():
    weight, mask = nn.Parameter(torch.randn(5, 7, dtype=torch.bfloat16)), torch.rand(5, 7) < 0.4
    optimizer, state = torch.optim.Adam([weight]), CompactState()
    optimizer.state[weight] = {"step": torch.tensor(3.0), "exp_avg": torch.randn(5, 7), "more": None}
    expected = {**optimizer.state[weight], "exp_avg": optimizer.state[weight]["exp_avg"] * mask}
    state.follow([optimizer], [Latent("", "", weight, None, {"mask": mask})])
    assert optimizer.state[weight]["exp_avg"].shape == (mask.sum(),)
    assert_same(optimizer.state_dict()["state"][0], expected)
    state.release()
    assert_same(optimizer.state[weight], expected)


# -- through Lightning ------------------------------------------------------------------------------------------------


def held_bytes(optimizer, weights):
    """Of what is remembered for each of the weights, counters aside."""
    slots = (slot for weight in weights if weight in optimizer.state for slot in optimizer.state[weight].values())
    return sum(local(slot).nbytes for slot in slots if torch.is_tensor(slot) and slot.ndim)


class Weighing(Classifier):
    """Looks how large the optimizer's state is while the model runs, which Lightning has inside of the step."""

    def __init__(self, name="sgd", **kwargs):
        super().__init__(schedule=False, **kwargs)
        self.make_optimizer, self.seen = KINDS[name], []
        self.lr = self.make_optimizer.keywords["lr"]

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        optimizer = self.trainer.optimizers[0]
        self.seen.append({key: held_bytes(optimizer, [weight]) for key, weight in self.named_parameters()})
        return loss


def train(compact, make_model, setting="ST3-freeze", ckpt_path=None, callbacks=(), plugins=(), **flags):
    """Train; return all that must be the same at the end, and the model."""
    model, callback = make_model(), SETTINGS[setting].build(compact_optimizer_state=compact)
    trainer = fit(model, callback, *callbacks, ckpt_path=ckpt_path, plugins=list(plugins), **flags)
    found = outcome(trainer, model, callback)
    found["optimizers"] = []
    for optimizer in trainer.optimizers:
        assert_left_alone(optimizer)
        for name, weight in model.named_parameters():
            live = callback.mask(name) if name in callback.targets else torch.ones_like(weight, dtype=torch.bool)
            slots = optimizer.state.get(weight, {})
            found["optimizers"].append({key: s[live] if s.shape == live.shape else s for key, s in slots.items()})
    return found, model, callback


def assert_left_alone(optimizer):
    """No hooks are left, and the state is full."""
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_state_dict_post_hooks
    for weight, slots in optimizer.state.items():
        assert {slot.shape for slot in slots.values() if slot is not None} <= {weight.shape, torch.Size()}


def assert_equal_runs(*args, **kwargs):
    assert_same(train(True, *args, **kwargs)[0], train(False, *args, **kwargs)[0])


@pytest.mark.parametrize("name", FIXED)
def test_training_ends_in_the_same_weights(name):
    assert_equal_runs(functools.partial(Classifier, optimizer="adamw"), name)


@pytest.mark.parametrize(
    ("make_model", "flags"),
    [
        (functools.partial(Classifier, optimizer="sgd"), {"max_epochs": 4}),
        *(pytest.param(functools.partial(Classifier, optimizer=name), {}, marks=slow) for name in OPTIMIZERS),
        (functools.partial(Weighing, "amsgrad"), {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}),
        (
            functools.partial(Classifier, optimizer="adamw-foreach"),
            {"precision": "bf16-true", "gradient_clip_val": 0.1},
        ),
        (functools.partial(ManualClassifier, optimizer="adam-fused"), {}),
        (Gan, {}),
        (functools.partial(Gan, together=True), {}),
    ],
)
def test_training_ends_in_the_same_weights_whatever_steps(make_model, flags):
    assert_equal_runs(make_model, **flags)


@pytest.mark.parametrize("kernel", ["plain-sgd", "fused-sgd", "fused-adamw"])
def test_a_skipped_step_is_none(kernel):
    results, scaler = [], None
    for compact in (True, False):
        scaling = Scaling()
        model = Overflowing(kernel)
        model.overflows = (2, 9, 10)
        results.append(train(compact, lambda model=model: model, plugins=[scaling])[0])
        scaler = scaling.scaler
    assert_same(*results)
    assert scaler.get_scale() < 2.0**14


@pytest.mark.parametrize(("name", "slots"), [("sgd", 1), ("Adam", 2), ("amsgrad", 3)])
def test_while_the_model_runs_the_state_has_the_kept_weights_only(name, slots):
    _, model, callback = train(True, functools.partial(Weighing, name))
    weights = dict(model.named_parameters())
    full = {key: slots * weight.nbytes for key, weight in weights.items()}
    kept = {key: slots * 4 * int(callback.mask(key).sum()) for key in callback.targets}
    assert model.seen[1] == full  # after the first step, long before the mask is frozen
    assert model.seen[-1] == full | kept
    assert sum(kept.values()) < 0.31 * sum(full[key] for key in kept)
    _, model, _ = train(False, functools.partial(Weighing, name))
    assert model.seen[-1] == full


def test_a_mask_that_was_there_first_saves_from_the_first_step_on():
    _, model, callback = train(True, Weighing, "StaticSparsity")
    kept = {key: 4 * int(callback.mask(key).sum()) for key in callback.targets}
    for seen in model.seen[1:]:
        assert {key: seen[key] for key in kept} == kept


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("setting", ["ST3-freeze", "KeepMask"])
def test_runs_resume_from_one_another(setting, before, after):
    make_model = functools.partial(Weighing, "Adam")
    expected, _, _ = train(before, make_model, setting, callbacks=[Saver()])
    for step in (7, 8, 9, 11):
        resumed, model, callback = train(after, make_model, setting, ckpt_path=f"step={step}.ckpt")
        assert_same(resumed, expected)
        kept = {key: 8 * int(callback.mask(key).sum()) for key in callback.targets}
        seen = {key: model.seen[0][key] for key in kept}  # the first forward finds what was loaded compact already
        assert (seen == kept) == (after and (step > 7 or setting == "KeepMask"))


def test_whoever_saves_gets_full_state_and_training_goes_on_with_the_compact_one():
    make_model = functools.partial(Weighing, "Adam")
    expected, model, callback = train(True, make_model)
    saving, watched, _ = train(True, make_model, callbacks=[Saver()])
    assert_same(saving, expected)
    assert watched.seen == model.seen
    train(False, make_model, callbacks=[plain := Saver()])
    assert plain.step == 12
    fulls = torch.load("step=12.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    train(True, make_model, callbacks=[Saver()])
    filled = torch.load("step=12.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    assert filled.keys() == fulls.keys()
    for index, (name, weight) in enumerate(model.named_parameters()):
        for key in ("exp_avg", "exp_avg_sq"):
            assert filled[index][key].shape == weight.shape
            mask = callback.mask(name) if name in callback.targets else torch.ones_like(weight, dtype=torch.bool)
            assert torch.equal(filled[index][key], fulls[index][key].where(mask, 0.0))


# -- ends -------------------------------------------------------------------------------------------------------------


class Failing(Weighing):
    """Raises at the third step before the last, in or outside of the step."""

    def __init__(self, place):
        super().__init__("Adam")
        self.place = place

    def fail(self, place):
        if place == self.place and self.global_step == 9:
            raise RuntimeError(place)

    def training_step(self, batch, batch_idx):
        self.fail("forward")
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer):
        self.fail("step")

    def on_train_batch_end(self, *args):
        self.fail("end")


@pytest.mark.parametrize("place", ["forward", "step", "end"])
def test_an_interrupted_run_leaves_full_state(place):
    model, callback = Failing(place), SETTINGS["ST3-freeze"].build(compact_optimizer_state=True)
    trainer = make_trainer(callback)
    with pytest.raises(RuntimeError, match=place):
        run(trainer, model)
    assert sum(model.seen[-1].values()) < sum(model.seen[1].values())
    assert_left_alone(trainer.optimizers[0])


def test_two_callbacks_share_an_optimizer():
    def results(compact):
        model = Weighing("Adam")
        some = {"start": 0.0, "end": 0.5, "verbose": False}
        callbacks = [
            ls.ST3(0.5, freeze=0.5, compact_optimizer_state=compact, targets=["net.0", "net.3"], **some),
            ls.GMP(0.7, compact_optimizer_state=compact, ignore=["net.0", "net.3"], update_every_n_steps=1, **some),
        ]
        trainer = fit(model, *callbacks)
        assert_left_alone(trainer.optimizers[0])
        return snapshot(model), model.seen

    (expected, large), (actual, small) = results(False), results(True)
    assert_same(actual, expected)
    assert all(small[-1][name] < large[-1][name] for name in ("net.0.weight", "net.3.weight", "net.6.weight"))


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [ls.SparseTraining, ls.ST3, ls.AutoSparse, ls.RigL, ls.STR, ls.TopKAST])
def test_a_mask_that_never_stays_is_refused(method):
    with pytest.raises(ValueError, match="argument `compact_optimizer_state` to be False where the mask is never"):
        method(compact_optimizer_state=True)


class Layerwise(torch.optim.SGD):
    """Might be LARS."""


@pytest.mark.parametrize("kind", [Layerwise, torch.optim.Muon])
def test_an_optimizer_that_may_look_at_a_whole_weight_is_refused(kind):
    net = nn.Sequential(nn.Linear(36, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))

    class Model(Classifier):
        def __init__(self):
            super().__init__(nn.Sequential(nn.Flatten(), *net))

        def configure_optimizers(self):
            return kind(self.parameters(), lr=0.01)

    fit(Model(), ls.StaticSparsity(0.5, verbose=False))
    with pytest.raises(
        MisconfigurationException, match=f"compact state of `{kind.__name__}`, .* or SGD of torch.optim"
    ):
        fit(Model(), ls.StaticSparsity(0.5, compact_optimizer_state=True, verbose=False))


# -- many ranks -------------------------------------------------------------------------------------------------------


class Part(SpreadClassifier):
    """Looks how large the optimizer's state on this rank is while the model runs."""

    def training_step(self, batch, batch_idx):
        self.held = held_bytes(self.trainer.optimizers[0], self.parameters())
        return super().training_step(batch, batch_idx)


def train_both_ways(folder, layouts):
    """Called on every rank."""
    for layout, compact in itertools.product(layouts, (False, True)):
        model, path = Part(), folder / f"{layout}-{compact}.ckpt"
        end = train_on_ranks("ST3-freeze", layout, save=path, model=model, compact_optimizer_state=compact)
        keep({**end, "held": model.held}, folder / f"{layout}-{compact}")
        end = train_on_ranks("ST3-freeze", layout, resume=path, compact_optimizer_state=not compact)
        keep(end, folder / f"{layout}-{compact}-resumed")


@pytest.mark.parametrize("layouts", [("ddp", "fsdp"), pytest.param(("fsdp-sharded",), marks=slow)])
def test_replicated_and_sharded_weights_end_the_same(tmp_path, layouts):
    spawn(train_both_ways, 2, tmp_path, layouts)
    for layout in layouts:
        full, compact = (torch.load(tmp_path / f"{layout}-{compact}") for compact in (False, True))
        assert compact.pop("held") < 0.7 * full.pop("held")
        assert_same(compact, full)
        for resumed in (torch.load(tmp_path / f"{layout}-{compact}-resumed") for compact in (False, True)):
            assert_same({**resumed, "compared": 0}, {**full, "compared": 0})
