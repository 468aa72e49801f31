"""Low, mixed and double precision: types, budgets kept among ties, resuming, and real loss scaling."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision

from tests.helpers.assertions import assert_different, assert_same, pruned
from tests.helpers.models import Classifier, Saver, fit, snapshot
from tests.helpers.probes import LateProbe, Probe
from tests.helpers.strategies import SETTINGS, every_strategy, parametrize

DTYPES = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "64-true": torch.float64}


def make_flags(precision):
    """A real scaler overflows in the first steps, and grows until it overflows again."""
    if precision != "16-mixed":
        return {"precision": precision}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**19, growth_interval=2)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


@every_strategy
@pytest.mark.parametrize(
    ("precision", "optimizer"),
    [("16-mixed", "adam-fused"), ("16-true", "sgd"), pytest.param("64-true", "sgd", marks=pytest.mark.slow)],
)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler:UserWarning")  # whose first steps are skipped
def test_laws_hold(setting, precision, optimizer):
    model, callback = Classifier(optimizer=optimizer), setting.build()
    fit(model, Probe(callback), callback, LateProbe(callback), **make_flags(precision))
    if setting.sparsity is not None:
        assert pruned(callback) == pytest.approx(setting.sparsity, abs=0.01)


class Watch(Callback):
    """Calls a function after every batch and keeps what it returns."""

    def __init__(self, look):
        self.look, self.seen = look, []

    def on_train_batch_end(self, *args):
        self.seen.append(self.look())


@pytest.mark.parametrize("precision", DTYPES)
def test_latents_have_the_type_of_the_weights_and_learned_scalars_more_than_half_precision(precision):
    callback, dtype = SETTINGS["AutoSparse"].build(threshold_weight_decay=0.0), DTYPES[precision]
    watch = Watch(lambda: callback.state_dict()["latents"]["net.8.weight"]["state"]["s"])
    fit(Classifier(), callback, watch, precision=precision)
    assert {callback.latent(name).dtype for name in callback.targets} == {dtype}
    assert {s.dtype for s in watch.seen} == {torch.promote_types(dtype, torch.float32)}
    # In the type of the weights most moves of the scalar would be lost.
    seen = len({float(s) for s in watch.seen}), len({float(s.to(torch.bfloat16)) for s in watch.seen})
    assert seen[0] == 12 > seen[1]


@parametrize("SparseTraining", "TopKGradientAnnealing", "GMP")
@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_budgets_are_kept_to_the_weight_among_ties(setting, precision):
    callback = setting.build(update_every_n_steps=1)

    def look():
        names, wanted, ties = callback.targets, callback.target_sparsity, 0
        for pool in [[name] for name in names] if callback.distribution == "uniform" else [names]:
            masks = torch.cat([callback.mask(name).flatten() for name in pool])
            assert int((~masks).sum()) == round(wanted * len(masks))
            thetas = torch.cat([callback.latent(name).flatten() for name in pool]).abs()
            ties += bool(wanted) and bool(thetas[~masks].max() == thetas[masks].min())
        return ties

    watch = Watch(look)
    fit(Classifier(), callback, watch, precision=precision)
    assert sum(watch.seen) or not callback.keeps_latent  # else pruned latents are zero
    assert callback.sparsity == pytest.approx(0.7, abs=4 / 700)


# -- resuming ---------------------------------------------------------------------------------------------------------


def train(callbacks, precision, optimizer="sgd", double=False, ckpt_path=None):
    model = Classifier(optimizer=optimizer)
    if double:
        model.double()
    savers = [Saver()] if ckpt_path is None else []
    trainer = fit(model, *callbacks, *savers, ckpt_path=ckpt_path, **make_flags(precision))
    return model, {
        "model": snapshot(model),
        "callbacks": [callback.state_dict() for callback in callbacks],
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "scaler": trainer.precision_plugin.state_dict(),
    }


@parametrize("AutoSparse", "GMP")
@pytest.mark.parametrize(
    ("precision", "optimizer"),
    [("16-mixed", "sgd"), ("16-mixed", "adam-fused"), ("16-true", "sgd"), ("64-true", "sgd")],
)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler:UserWarning")  # whose first steps are skipped
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_resumed_run_equals_the_uninterrupted_one(setting, precision, optimizer):
    settings = {"precision": precision, "optimizer": optimizer, "double": precision == "64-true"}
    _, expected = train([setting.build()], **settings)
    if precision == "16-mixed":
        assert expected["callbacks"][0]["steps"][0] < 12
    for step in (2, 7):
        assert_same(train([setting.build()], ckpt_path=f"step={step}.ckpt", **settings)[1], expected)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
@parametrize("AutoSparse")
def test_lightning_rounds_a_float32_model_when_it_resumes_in_double_precision(setting):
    """It loads the checkpoint before it converts the model. Hence ``model.double()`` above; only latents are exact."""
    for callbacks in ([], [setting.build()]):
        plain, _ = train(callbacks, "64-true")
        resumed, _ = train([setting.build() for _ in callbacks], "64-true", ckpt_path="step=6.ckpt")
        assert_different(resumed, plain)
        for one, other in zip(resumed.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
