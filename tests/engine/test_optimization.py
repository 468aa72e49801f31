"""Every way to take a step: accumulated, clipped, scaled, skipped, with several optimizers or one of the user's own."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_sparse import GMP, ST3, OptG, SparseTraining
from tests.helpers.assertions import assert_same, assert_sparse, count_sparsity, pruned
from tests.helpers.models import (
    Classifier,
    Gan,
    Loader,
    ManualClassifier,
    Stream,
    fit,
    make_net,
    make_trainer,
    snapshot,
)
from tests.helpers.probes import LateProbe, Probe, ProbedSGD
from tests.helpers.strategies import every_strategy, parametrize, some_strategies


def make_model():
    return Classifier(make_net(norm=False, dropout=0.0), schedule=False)


def keep_largest(thetas, sparsity):
    """Masks that keep the largest magnitudes of all tensors, by sorting."""
    flat = torch.cat([theta.abs().flatten() for theta in thetas.values()])
    threshold = flat.sort(descending=True).values[len(flat) - round(sparsity * len(flat)) - 1]
    return {name: theta.abs() >= threshold for name, theta in thetas.items()}


def train_by_hand(gradient, accumulate, clip):
    """The same training as a plain loop over dense parameters, with the sparse weights as inputs of the network."""
    model = make_model()
    optimizer, parameters = model.configure_optimizers(), dict(model.named_parameters())
    targets = [name for name, parameter in parameters.items() if parameter.ndim > 1]
    batches = list(Loader())
    for _ in range(3):
        for window in (batches[i : i + accumulate] for i in range(0, len(batches), accumulate)):
            masks = keep_largest({name: parameters[name].detach() for name in targets}, 0.6)
            weights = {
                name: (parameter.detach() * masks[name] if name in targets else parameter.detach()).requires_grad_()
                for name, parameter in parameters.items()
            }
            for images, labels in window:
                loss = nn.functional.cross_entropy(torch.func.functional_call(model, weights, (images,)), labels)
                (loss / accumulate).backward()
            for name, parameter in parameters.items():
                masked = gradient == "masked" and name in targets
                parameter.grad = weights[name].grad * masks[name] if masked else weights[name].grad
            if clip == "norm":
                nn.utils.clip_grad_norm_(parameters.values(), 0.1)
            elif clip == "value":
                nn.utils.clip_grad_value_(parameters.values(), 0.01)
            optimizer.step()
    masks = keep_largest({name: parameters[name].detach() for name in targets}, 0.6)
    return {name: p.detach() for name, p in parameters.items() if name in targets}, masks


@pytest.mark.parametrize("gradient", ["straight_through", "masked"])
@pytest.mark.parametrize("accumulate", [1, 3])  # of four batches: the last window of an epoch is incomplete
@pytest.mark.parametrize("clip", [None, "norm", "value"])
def test_training_equals_a_plain_loop_over_the_latents(gradient, accumulate, clip):
    model, callback = make_model(), SparseTraining(0.6, end=0.0, gradient=gradient, verbose=False)
    flags = {"gradient_clip_val": 0.1 if clip == "norm" else 0.01, "gradient_clip_algorithm": clip} if clip else {}
    trainer = make_trainer(callback, accumulate_grad_batches=accumulate, **flags)
    trainer.fit(model, Loader(), Loader())
    latents, masks = train_by_hand(gradient, accumulate, clip)
    for name, expected in latents.items():
        torch.testing.assert_close(callback.latent(name), expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(callback.mask(name), masks[name])


@every_strategy
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_laws_hold_in_every_precision(setting, precision):
    model, callback = Classifier(), setting.build()
    probes = [Probe(callback), LateProbe(callback)]
    fit(model, *probes, callback, precision=precision)
    assert model.net[0].weight.dtype == {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(
        precision, torch.float32
    )
    if setting.sparsity is not None:
        assert pruned(callback) == pytest.approx(setting.sparsity, abs=0.03 if "bf16-true" in precision else 0.01)


def make_scaling(scale, **kwargs):
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3, **kwargs))


class Steps(Callback):
    """Counts the batches after which no latent has moved."""

    def __init__(self, sparse):
        self.sparse, self.before, self.skipped = sparse, None, 0

    def on_train_batch_start(self, *args):
        self.before = {name: self.sparse.latent(name).clone() for name in self.sparse.targets}

    def on_train_batch_end(self, *args):
        self.skipped += all(self.sparse.latent(name).equal(before) for name, before in self.before.items())


@some_strategies
@pytest.mark.parametrize("make_model", [Classifier, ManualClassifier])
def test_steps_that_a_gradient_scaler_skips_leave_sparse_weights(setting, make_model):
    model, callback = make_model(), setting.build()
    steps, probes = Steps(callback), [Probe(callback), LateProbe(callback)]
    fit(model, probes[0], steps, callback, probes[1], plugins=[make_scaling(2.0**18)])
    assert steps.skipped >= 2
    taken = callback.state_dict()["steps"][0]
    assert taken == 12 - steps.skipped if make_model is Classifier else 0 < taken < 6
    assert_sparse(model, callback)


@parametrize("AutoSparse", "GMP")
@pytest.mark.filterwarnings("ignore:.*pruned nothing:UserWarning")
def test_zero_sparsity_under_a_gradient_scaler(setting):
    plain, sparse = Classifier(), Classifier()
    fit(plain, plugins=[make_scaling(2.0**18)])
    fit(sparse, setting.build_dense(), plugins=[make_scaling(2.0**18)])
    assert_same(snapshot(sparse), snapshot(plain))


class Retrying(Classifier):
    """Takes two steps a batch, the first of which a gradient scaler skips in the first batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for _ in range(2):
            self.optimizers().zero_grad()
            self.manual_backward(self.compute_loss(batch))
            self.optimizers().step()

    def configure_optimizers(self):
        return ProbedSGD(self.parameters(), lr=0.1)


def test_a_step_right_after_a_skipped_one_sees_latents_and_their_gradients():
    model, callback = Retrying(), SparseTraining(0.7, end=0.0, gradient="masked", verbose=False)
    seen = []

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            optimizer.look = look

    def look():
        for name in callback.targets:
            parameter = model.get_parameter(name)
            assert torch.equal(parameter, callback.latent(name))
            assert not parameter.grad[~callback.mask(name)].any()
        seen.append(model.global_step)

    fit(model, Watch(), callback, plugins=[make_scaling(2.0**60, backoff_factor=2.0**-50)])
    assert seen == list(range(1, 24))


class Unused(Classifier):
    """Has a branch that is used in odd batches only, and one that is never used."""

    def __init__(self):
        super().__init__()
        self.sometimes, self.never = nn.Linear(36, 3), nn.Linear(6, 6)

    def training_step(self, batch, batch_idx):
        loss = self.compute_loss(batch)
        return loss + self.sometimes(batch[0].flatten(1)).square().mean() if batch_idx % 2 else loss


@pytest.mark.filterwarnings("ignore:`OptG` has pruned all")
@every_strategy
def test_weights_without_a_gradient_are_sparse_too(setting):
    model, callback = Unused(), setting.build(**setting.unheard)
    untouched = model.never.weight.detach().clone()
    fit(model, Probe(callback), callback)
    assert "never.weight" in callback.targets
    mask = callback.mask("never.weight")
    assert mask.sum() < 36
    assert mask.any() or isinstance(callback, OptG)  # whose scores know nothing of such a weight
    if type(callback) in (SparseTraining, GMP):  # whose projection and update leave such a weight alone
        assert torch.equal(model.never.weight, untouched * mask)
    if setting.sparsity is not None:
        assert pruned(callback) == pytest.approx(setting.sparsity, abs=0.01)


class Skipping(Classifier):
    def training_step(self, batch, batch_idx):
        return None if batch_idx == 1 else self.compute_loss(batch)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
@some_strategies
def test_batches_without_a_loss_are_no_steps(setting):
    model, callback = Skipping(), setting.build()
    steps = Steps(callback)
    fit(model, Probe(callback), steps, callback)
    assert steps.skipped == 3
    assert_sparse(model, callback)


class Doubled(torch.optim.SGD):
    """Calls ``super().step()``, so that the hooks of PyTorch fire twice, and then changes the parameters again."""

    def step(self, closure=None):
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(0.99)
        return loss


class Written(torch.optim.SGD):
    """The same in one step: decay after the update."""

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=group["lr"])
                parameter.mul_(0.99)
        return loss


def with_optimizer(cls):
    class Model(Classifier):
        def configure_optimizers(self):
            return cls(self.parameters(), lr=0.1)

    return Model(make_net(norm=False, dropout=0.0))


@parametrize("AutoSparse", "GMP")
def test_an_optimizer_that_calls_the_step_of_its_base_class(setting):
    torch.optim.SGD([torch.zeros(1)])  # PyTorch patches a class when it is first used
    runs = []
    for cls in (Doubled, Written):
        model, callback = with_optimizer(cls), setting.build()
        fit(model, Probe(callback), callback)
        runs.append({name: callback.latent(name) for name in callback.targets})
    for name, latent in runs[0].items():
        torch.testing.assert_close(latent, runs[1][name], rtol=1e-4, atol=1e-6)


class Replacing(Callback):
    """Replaces the optimizer in the middle of training."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            trainer.optimizers = [torch.optim.SGD(pl_module.parameters(), lr=0.05)]


@parametrize("AutoSparse", "GMP")
def test_an_optimizer_that_is_replaced_is_followed(setting):
    model, callback = Classifier(schedule=False), setting.build()
    trainer = fit(model, Probe(callback), Replacing(), callback)
    assert callback.state_dict()["steps"] == {0: 12}
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    if setting.sparsity is not None:
        assert pruned(callback) == pytest.approx(setting.sparsity, abs=0.01)


class Raw(Classifier):
    """Steps its optimizer behind Lightning's back."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.compute_loss(batch))
        if self.global_step < 2:
            self.optimizers().step()
        else:
            self.trainer.optimizers[0].step()


@some_strategies
def test_a_step_without_lightning_is_refused_and_leaves_sparse_weights(setting):
    model, callback = Raw(), setting.build()
    with pytest.raises(
        MisconfigurationException, match=r"`SGD` was stepped without Lightning, so .* step the optimizers"
    ):
        fit(model, callback)
    assert_sparse(model, callback)


@some_strategies
@pytest.mark.parametrize("together", [False, True])
def test_gan(setting, together):
    model, callback = Gan(together), setting.build()
    fit(model, Probe(callback), callback, LateProbe(callback))
    assert set(callback.state_dict()["steps"]) == {0, 1}
    assert set(callback.targets) == {name for name, p in model.named_parameters() if p.ndim > 1}
    if setting.sparsity is not None:
        assert pruned(callback) == pytest.approx(setting.sparsity, abs=0.01)


def test_the_optimizers_of_a_gan_share_one_budget():
    model, callback = Gan(), ST3(0.7, start=0, end=0, verbose=False)

    class Look(Callback):
        def on_train_batch_end(self, *args):
            thresholds = {callback.threshold(name) for name in callback.targets}
            assert len(thresholds) == 1
            assert callback.sparsity == pytest.approx(0.7, abs=1e-3)

    fit(model, Look(), callback)


class Tied(Classifier):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.net[5].weight = self.net[3].weight


@parametrize("AutoSparse", "GMP")
def test_tied_weights_are_treated_once(setting):
    model, callback = Tied(), setting.build()
    fit(model, Probe(callback), callback)
    assert callback.targets == ["net.1.weight", "net.3.weight"]
    assert model.net[5].weight is model.net[3].weight
    assert callback.sparsity == count_sparsity(model, callback.targets)


@parametrize("AutoSparse", "GMP")
def test_frozen_weights_stay_as_they_are(setting):
    model, callback = Classifier(), setting.build()
    model.net[3].weight.requires_grad_(False)
    before = model.net[3].weight.clone()
    fit(model, callback)
    assert "net.3.weight" not in callback.targets
    assert torch.equal(model.net[3].weight, before)


class Late(Classifier):
    """Has no layers before Lightning asks for them."""

    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = make_net(dropout=0.0)


@parametrize("AutoSparse", "GMP")
def test_modules_built_in_configure_model(setting):
    late, early = Late(), Classifier(make_net(dropout=0.0))
    callbacks = setting.build(), setting.build()
    fit(late, Probe(callbacks[0]), callbacks[0])
    fit(early, callbacks[1])
    assert_same(snapshot(late), snapshot(early))


@some_strategies
def test_channels_last(setting):
    models, callbacks = [Classifier(), Classifier()], [setting.build(), setting.build()]
    models[0].to(memory_format=torch.channels_last)
    fit(models[0], Probe(callbacks[0]), callbacks[0])
    fit(models[1], callbacks[1])
    assert models[0].net[0].weight.is_contiguous(memory_format=torch.channels_last)
    for name in callbacks[0].targets:
        torch.testing.assert_close(callbacks[0].latent(name), callbacks[1].latent(name), rtol=1e-3, atol=1e-4)


@some_strategies
@pytest.mark.parametrize("flags", [{"max_steps": 9, "max_epochs": -1}, {"max_epochs": 4}], ids="-".join)
def test_data_of_unknown_length(setting, flags):
    model, callback = Classifier(), setting.build()
    trainer = make_trainer(Probe(callback), callback, **flags)
    trainer.fit(model, torch.utils.data.DataLoader(Stream(), None), Loader())
    if setting.sparsity is not None:
        assert pruned(callback) == pytest.approx(setting.sparsity, abs=0.01)


@parametrize("AutoSparse", "GMP")
def test_training_of_no_batches_changes_nothing(setting):
    model, callback = Classifier(), setting.build()
    before = snapshot(model)
    fit(model, callback, limit_train_batches=0, limit_val_batches=0)
    assert_same(snapshot(model), before)
    assert callback.targets == []
