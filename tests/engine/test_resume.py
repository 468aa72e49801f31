"""Law 4: a run that is killed at any step and resumed ends bit for bit as if nothing had happened."""

import warnings

import pytest
import torch
from lightning.pytorch.callbacks import Callback

import lightning_sparse as ls
from tests.helpers.assertions import assert_different, assert_same, assert_sparse, count_sparsity
from tests.helpers.models import Classifier, Gan, Loader, ManualClassifier, Saver, fit, make_trainer, outcome, snapshot
from tests.helpers.strategies import SETTINGS, every_strategy, parametrize, some_strategies
from tests.helpers.sweep import Config, SaveOnce

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")


def run(callbacks, make_model=Classifier, ckpt_path=None, **flags):
    """Train; return all that must be the same at the end."""
    model = make_model()
    trainer = fit(model, *callbacks, *([Saver()] if ckpt_path is None else []), ckpt_path=ckpt_path, **flags)
    return outcome(trainer, model, *callbacks)


def check_resume(make_callbacks, checkpoints, **kwargs):
    expected = run(make_callbacks(), **kwargs)
    assert expected["metrics"][0]["flops/training_total"] > 0
    for checkpoint in checkpoints:
        assert_same(run(make_callbacks(), ckpt_path=f"{checkpoint}.ckpt", **kwargs), expected, checkpoint)


@every_strategy
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumed_run_equals_the_uninterrupted_one(setting, accumulate):
    steps = [1, 4, 5] if accumulate == 2 else [2, 4, 8, 9, 11]  # 4 and 8 end an epoch
    checkpoints = [f"step={step}" for step in steps] + [f"epoch={epoch}" for epoch in (0, 2)]
    check_resume(lambda: [setting.build()], checkpoints, accumulate_grad_batches=accumulate, max_epochs=4)


@pytest.mark.filterwarnings("ignore:Training ended at sparsity 0.0000, before `Iterative:UserWarning")  # in a round
@every_strategy
@pytest.mark.parametrize(
    ("flags", "checkpoint"),
    [({}, "epoch=2"), ({"max_epochs": -1, "max_steps": 2}, "step=2"), ({"max_epochs": -1, "max_steps": 4}, "epoch=0")],
)
def test_a_finished_run_that_is_resumed_knows_what_it_was(setting, flags, checkpoint):
    flags = {**flags, "limit_val_batches": 0}  # nor a sanity check
    expected = run([setting.build()], **flags)
    resumed = run([setting.build()], ckpt_path=f"{checkpoint}.ckpt", **flags)
    for key in ("model", "optimizers", "callbacks", "metrics", "reports"):
        assert_same(resumed[key], expected[key], key)


@pytest.mark.filterwarnings("ignore:Training ended at sparsity:UserWarning")
@pytest.mark.parametrize(
    "config",
    [
        Config(sized=False, kwargs={"end": 2, "freeze": 2, "schedule": "detour"}),
        Config(validate=None, kwargs={"end": 0.75}),
    ],
)
def test_a_finished_run_that_is_resumed_knows_where_its_ramp_stood(config):
    expected = config.train(config.build(), SaveOnce(("epoch", 1)))
    assert_same(config.train(config.build(), ckpt_path=SaveOnce.path)["metrics"], expected["metrics"])


@some_strategies
@pytest.mark.parametrize(
    ("make_model", "checkpoints"),
    [(ManualClassifier, ["step=1", "epoch=0", "step=3"]), (Gan, ["step=1", "step=3", "epoch=0", "step=10", "epoch=1"])],
)
def test_resumed_manual_optimization_equals_the_uninterrupted_one(setting, make_model, checkpoints):
    check_resume(lambda: [setting.build()], checkpoints, make_model=make_model)


@parametrize("AutoSparse", "TopKGradientAnnealing")
@pytest.mark.parametrize(
    "flags",
    [
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"val_check_interval": 2},
        {"max_steps": 9, "max_epochs": -1},
        {"gradient_clip_val": 0.1, "accumulate_grad_batches": 3},
    ],
    ids="-".join,
)
def test_resumed_run_equals_the_uninterrupted_one_under_the_flags_of_the_trainer(setting, flags):
    check_resume(lambda: [setting.build()], ["step=2", "step=3"], **flags)


def make_two_callbacks():
    return [
        ls.ST3(0.5, targets=["net.0", "net.3"], end=0.5, verbose=False),
        ls.AutoSparse(threshold_init=-3.0, ignore=["net.0", "net.3"], verbose=False),
    ]


def test_two_callbacks_resume():
    check_resume(make_two_callbacks, ["step=3", "epoch=0", "step=10"], make_model=lambda: Classifier(optimizer="adamw"))


@every_strategy
def test_checkpoint_is_the_sparse_model_and_loads_without_executing_code(setting):
    callback = setting.build()
    expected = run([callback])
    loaded = Classifier.load_from_checkpoint("step=12.ckpt", weights_only=True)
    assert_same(snapshot(loaded), expected["model"])
    assert count_sparsity(loaded, callback.targets) == callback.sparsity > 0.3
    make_trainer(setting.build()).fit(Classifier(), Loader(), Loader(), ckpt_path="epoch=0.ckpt", weights_only=True)


def test_checkpoint_holds_only_the_pruned_entries_of_latents_that_are_exact_elsewhere():
    callback = SETTINGS["TopKGradientAnnealing"].build()
    run([callback])
    state = torch.load("step=12.ckpt", weights_only=True)["callbacks"][callback.state_key]["latents"]
    for name in callback.targets:
        packed = [*state[name]["bits"].values(), state[name]["pruned"]]
        assert sum(t.nbytes for t in packed) <= -(-callback.mask(name).numel() // 8) + 4 * (~callback.mask(name)).sum()


@every_strategy
def test_checkpoint_without_our_state_warns_once_and_starts_from_its_weights(setting):
    plain = Classifier()
    fit(plain, Saver())
    model, callback, seen = Classifier(), setting.build(), {}

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.setdefault("weights", {name: callback.latent(name).clone() for name in callback.targets})

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model, callback, Watch(), ckpt_path="epoch=0.ckpt")
    assert len([w for w in caught if "holds no state of" in str(w.message)]) == 1
    saved = torch.load("epoch=0.ckpt", weights_only=False)["state_dict"]
    if callback.keeps_latent:
        assert_same(seen["weights"], {name: callback.lift(saved[name].clone()) for name in callback.targets})
    assert_sparse(model, callback)
    assert_different(model, plain)
