"""Noise: in the weights while a batch is trained on, the same for a whole step, and seen by nobody else."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, EMAWeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from lightning_sparse import SparseTraining, functional
from lightning_sparse.functional.sharding import whole
from tests.helpers.assertions import assert_same, assert_sparse
from tests.helpers.models import (
    Classifier,
    Loader,
    ManualClassifier,
    ResumableLoader,
    Saver,
    fit,
    make_net,
    make_trainer,
    outcome,
    snapshot,
)
from tests.helpers.ranks import SpreadClassifier, keep, spawn
from tests.helpers.spent import assert_spent
from tests.reference.training import largest

LR, PUSH = 0.02, 0.5


class Noisy(SparseTraining):
    """w = s m u theta with u in [0.5, 1.5) anew at each step; s is learned by Adam; latents shrink after each step."""

    stochastic, learner = True, "adam"

    def __init__(self, **kwargs):
        super().__init__(0.6, **{"end": 0.0, "verbose": False, **kwargs})

    def init_state(self, theta):
        return {"s": torch.ones_like(theta, requires_grad=True)}

    def factor(self, latent, context):
        noise = functional.draw(latent.theta, latent.noise) + 0.5 if context.training else 1.0
        return noise * latent.state["s"].detach()

    def project(self, latent, context, out):
        super().project(latent, context, out)
        out.mul_(self.factor(latent, context))

    def pull_back(self, latent, grad, context):
        assert context.training
        heard = grad * latent.mask
        latent.state["s"].grad = heard * latent.theta * (functional.draw(latent.theta, latent.noise) + 0.5)
        return heard * self.factor(latent, context)

    def after_step(self, latent, lr, context):
        latent.theta.mul_(1 - PUSH * lr)

    def learning_rate(self, group, context):
        return LR / context.step


def held(model, names):
    return {name: whole(model.get_parameter(name).detach()).clone() for name in names}


def at_rest(callback):
    """What the weights are without noise."""
    states = callback._weights.latents
    return {name: torch.where(x.mask, x.theta * x.state["s"].detach(), 0.0) for name, x in states.items()}


class Stepper(Classifier):
    """Takes so many steps a batch, each with a forward and backward pass of its own, or one in so many batches."""

    def __init__(self, per_batch=1, window=1):
        super().__init__(make_net(norm=False, dropout=0.0), schedule=False)
        self.automatic_optimization, self.per_batch, self.window, self.seen = False, per_batch, window, []

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for _ in range(self.per_batch):
            self.seen.append(held(self, [name for name, p in self.named_parameters() if p.ndim > 1]))
            self.manual_backward(self.compute_loss(batch))
            if (batch_idx + 1) % self.window == 0 or self.trainer.is_last_batch:
                optimizer.step()
                optimizer.zero_grad()


class Automatic(Stepper):
    """The same with one step in ``accumulate_grad_batches`` batches."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = True

    def training_step(self, batch, batch_idx):
        self.seen.append(held(self, [name for name, p in self.named_parameters() if p.ndim > 1]))
        return self.compute_loss(batch)


def train_by_hand(per_batch=1, window=1, mean=False):
    """The same as a plain loop with autograd; returns the weights at rest and all that the network has seen."""
    model = Classifier(make_net(norm=False, dropout=0.0), schedule=False)
    optimizer, thetas = model.configure_optimizers(), dict(model.named_parameters())
    names = [name for name, theta in thetas.items() if theta.ndim > 1]
    scales = {name: torch.ones_like(thetas[name], requires_grad=True) for name in names}
    adam, source, steps, seen = torch.optim.Adam(scales.values()), torch.Generator().manual_seed(0), 0, []
    size = sum(thetas[name].numel() for name in names)
    batches = list(Loader())

    def draw():
        seeds = [int(torch.randint(1 << 62, (), generator=source)) for _ in names]
        noise = [
            torch.rand(thetas[n].shape, generator=torch.Generator().manual_seed(s)) + 0.5
            for n, s in zip(names, seeds, strict=True)
        ]
        return dict(zip(names, noise, strict=True))

    def choose():
        return dict(zip(names, largest([thetas[name] for name in names], size - round(0.6 * size)), strict=True))

    masks, noise = choose(), draw()
    for _ in range(3):
        for index, batch in enumerate(batches):
            for _ in range(per_batch):
                shown = {name: thetas[name] * masks[name] * noise[name] * scales[name] for name in names}
                seen.append({name: weight.detach().clone() for name, weight in shown.items()})
                output = torch.func.functional_call(model, shown, (batch[0],))
                (nn.functional.cross_entropy(output, batch[1]) / (window if mean else 1)).backward()
                if (index + 1) % window and index + 1 < len(batches):
                    continue
                steps += 1
                adam.param_groups[0]["lr"] = LR / steps
                optimizer.step()
                adam.step()
                optimizer.zero_grad()
                adam.zero_grad()
                for name in names:
                    thetas[name].data.mul_(1 - PUSH * optimizer.param_groups[0]["lr"])
                masks, noise = choose(), draw()
    return {name: (thetas[name] * masks[name] * scales[name]).detach() for name in names}, seen


@pytest.mark.parametrize(
    ("model", "flags", "by_hand"),
    [
        (Automatic, {}, {}),
        (Automatic, {"accumulate_grad_batches": 3}, {"window": 3, "mean": True}),
        (lambda: Stepper(per_batch=3), {}, {"per_batch": 3}),
        (lambda: Stepper(window=2), {}, {"window": 2}),
    ],
    ids=["automatic", "accumulated", "three steps a batch", "one step in two batches"],
)
def test_training_with_noise_equals_a_plain_loop(model, flags, by_hand):
    model = model()
    make_trainer(Noisy(), **flags).fit(model, Loader(), Loader())
    expected, seen = train_by_hand(**by_hand)
    torch.testing.assert_close(held(model, expected), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.seen, seen, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("window", [1, 3])
def test_noise_is_new_after_each_step_and_the_same_within_a_window(window):
    model, callback = Automatic(), Noisy()

    class StandStill(Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.optimizers[0].param_groups[0]["lr"] = 0.0  # so that nothing but noise can move the weights

    callback.learning_rate = lambda group, context: 0.0
    make_trainer(callback, StandStill(), accumulate_grad_batches=window).fit(model, Loader(), Loader())
    rest, name = held(model, callback.targets), callback.targets[0]
    steps = [-(-(batch % 4 + 1) // window) + (batch // 4) * -(-4 // window) for batch in range(12)]
    for i, one in enumerate(model.seen):
        assert not one[name].equal(rest[name])
        for j, other in enumerate(model.seen[:i]):
            assert all(one[name].equal(other[name]) == (steps[i] == steps[j]) for name in rest)


DURING = {"on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step"}


class Look(Callback):
    """Compares in each hook what the model holds with what it is to hold at rest.

    Attributes:
        noisy: The hooks in which it has held something else.
    """

    def __init__(self, sparse):
        self.sparse, self.noisy, self.quiet = sparse, set(), set()


def _hook(name):
    def look(self, trainer, pl_module, *args, **kwargs):
        if self.sparse._attached:
            at_rest_now = at_rest(self.sparse)
            same = all(pl_module.get_parameter(key).equal(weight) for key, weight in at_rest_now.items())
            (self.quiet if same else self.noisy).add(name)

    return look


for _name in [hook for hook in vars(Callback) if hook.startswith("on_") and "checkpoint" not in hook]:
    setattr(Look, _name, _hook(_name))


@pytest.mark.parametrize("make_model", [Classifier, ManualClassifier])
def test_callbacks_see_noise_only_between_start_and_end_of_a_batch(make_model):
    callback = Noisy()
    before, model = Look(callback), make_model()
    behind = type("Behind", (Look, Checkpoint), {})(callback)
    fit(model, before, callback, behind, accumulate_grad_batches=1 if make_model is ManualClassifier else 2)
    during = DURING if make_model is Classifier else DURING - {"on_before_zero_grad"}
    assert before.noisy == during
    assert behind.noisy == during | {"on_train_batch_start"}
    assert not before.noisy & before.quiet
    assert {"on_train_batch_end", "on_validation_batch_start", "on_train_epoch_end"} <= before.quiet & behind.quiet


class SaveWithin(Checkpoint):
    """Saves at a moment at which the network holds noise."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        trainer.save_checkpoint(f"start-{trainer.global_step}.ckpt")

    def on_after_backward(self, trainer, pl_module):
        before = snapshot(pl_module)
        trainer.save_checkpoint(f"within-{trainer.global_step}.ckpt")
        assert_same(snapshot(pl_module), before)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_a_checkpoint_of_a_noisy_moment_holds_no_noise():
    callback, model, rest = Noisy(), Classifier(), {}

    class Rest(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            rest[trainer.global_step] = held(pl_module, callback.targets)

    fit(model, callback, Rest(), SaveWithin())
    for step in range(1, 12):
        for moment in ("start", "within"):
            saved = torch.load(f"{moment}-{step}.ckpt", weights_only=True)["state_dict"]
            assert_same({name: saved[name] for name in callback.targets}, rest[step])
    plain = Classifier()
    fit(plain, Noisy())
    assert_same(snapshot(model), snapshot(plain))


def run(*callbacks, make_model=Classifier, ckpt_path=None, **flags):
    model, callback = make_model(), Noisy()
    trainer = fit(model, callback, *callbacks, ckpt_path=ckpt_path, **flags)
    return outcome(trainer, model, callback)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
@pytest.mark.parametrize(("make_model", "accumulate"), [(Classifier, 1), (Classifier, 2), (ManualClassifier, 1)])
def test_resumed_at_any_step_it_ends_as_if_it_had_not_stopped(make_model, accumulate):
    flags = {"make_model": make_model, "accumulate_grad_batches": accumulate}
    expected = run(Saver(), **flags)
    for step in range(1, 12 if accumulate == 1 and make_model is Classifier else 6):
        assert_same(run(ckpt_path=f"step={step}.ckpt", **flags), expected, f"step {step}")


def test_an_average_holds_no_noise():
    model, callback, steps = Classifier(make_net(norm=False)), Noisy(), []

    class Weights(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            steps.append(at_rest(callback))

    fit(model, Weights(), callback, EMAWeightAveraging(decay=0.8), limit_val_batches=0)
    for name in callback.targets:
        average = steps[0][name]
        for step in steps[1:]:
            average = 0.8 * average + 0.2 * step[name]
        torch.testing.assert_close(model.get_parameter(name).detach(), average * callback.mask(name))


class Leaving(Classifier):
    """Skips the rest of the second epoch, after noise was shown for its third batch."""

    def on_train_batch_start(self, batch, batch_idx):
        super().on_train_batch_start(batch, batch_idx)
        return -1 if (self.current_epoch, batch_idx) == (1, 2) else None


def test_a_batch_that_is_skipped_leaves_no_noise():
    callback = Noisy()
    look, rows, model = Look(callback), [], Leaving()

    class Weights(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            rows.append((trainer.global_step, held(pl_module, callback.targets), at_rest(callback)))

    make_trainer(look, Weights(), callback).fit(model, Loader(), Loader())
    assert [step for step, *_ in rows] == [4, 6, 10]
    for _, weights, rest in rows:
        assert_same(weights, rest)
    assert look.noisy == DURING
    assert_same(held(model, callback.targets), at_rest(callback))


class Sitting(Classifier):
    """Computes gradients but takes no step in every second batch."""

    def __init__(self):
        super().__init__(schedule=False)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        if batch_idx % 2:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


def test_a_step_that_is_not_taken_leaves_no_noise_in_the_latents():
    model, callback, latents = Sitting(), Noisy(), []

    class Latents(Callback):
        def on_train_batch_end(self, *args):
            latents.append({name: callback.latent(name).clone() for name in callback.targets})

    look = Look(callback)
    fit(model, look, Latents(), callback)
    start = Sitting()
    assert_same(latents[0], held(start, callback.targets))
    for odd, even in zip(latents[1::2], latents[2::2], strict=False):
        assert_same(even, odd)
    assert "on_train_batch_end" not in look.noisy


class Bomb(Callback):
    def __init__(self, hook):
        setattr(self, hook, self.explode)

    def explode(self, trainer, *args):
        if trainer.global_step == 5:
            raise RuntimeError("boom")


@pytest.mark.parametrize("hook", sorted(DURING | {"on_train_batch_end"}))
def test_who_handles_an_exception_sees_no_noise(hook):
    model, callback = Classifier(), Noisy()
    look = Look(callback)
    with pytest.raises(RuntimeError, match="boom"):
        fit(model, look, Bomb(hook), callback)
    assert "on_exception" in look.quiet
    assert_same(held(model, callback.targets), at_rest(callback))


class Agreement(Callback):
    """Checks that what the ranks train with, and what they hold after each batch, is the same."""

    def __init__(self):
        self.seen = []

    def compare(self, trainer, pl_module):
        weights = {name: whole(p.detach()).clone() for name, p in pl_module.named_parameters()}
        for weight in weights.values():
            assert all(other.equal(weight) for other in trainer.strategy.all_gather(weight).view(2, *weight.shape))
        self.seen.append(weights)

    def on_before_backward(self, trainer, pl_module, loss):
        self.compare(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.compare(trainer, pl_module)


def train_on_ranks(folder):
    for layout in ("ddp", "fsdp"):
        agreement, model, callback = Agreement(), SpreadClassifier(), Noisy()
        strategy = "ddp" if layout == "ddp" else ModelParallelStrategy(2, 1)
        trainer = make_trainer(agreement, callback, devices=2, strategy=strategy)
        loader = Loader(seed=torch.distributed.get_rank())
        trainer.fit(model, loader, Loader())
        keep(agreement.seen, folder / layout)


@pytest.mark.slow  # test_ranks.py trains the strategies that have noise
def test_ranks_draw_the_same_noise_replicated_or_sharded(tmp_path):
    spawn(train_on_ranks, 2, tmp_path)
    ddp, fsdp = torch.load(tmp_path / "ddp"), torch.load(tmp_path / "fsdp")
    assert len(ddp) == 24
    assert_same(fsdp, ddp)


def test_a_second_fit_and_a_fresh_callback_draw_the_same_noise():
    seen = []
    for _ in range(2):
        model = Automatic()
        make_trainer(Noisy()).fit(model, ResumableLoader(), Loader())
        seen.append(model.seen)
    assert_same(seen[1], seen[0])


def test_what_the_network_computes_with_noise_is_counted_as_dense():
    # Per sample and weight one for the output, one for the input and one for the gradient, until the mask is frozen.
    assert_spent(Noisy(freeze=0.5), lambda step, density: 3.0 - 2.0 * density if step <= 30 else density)


def test_sparse_weights_end_without_noise():
    model, callback = Classifier(), Noisy(freeze=0.75)
    fit(model, callback)
    assert_sparse(model, callback)
