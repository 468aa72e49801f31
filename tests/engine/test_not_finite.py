"""NaN and infinity in losses and gradients: they show, they can be skipped, and training goes on from before them."""

from itertools import pairwise

import pytest
import torch

from tests.helpers.assertions import assert_same, assert_sparse
from tests.helpers.models import Classifier, Saver, fit, outcome
from tests.helpers.probes import LateProbe, Probe
from tests.helpers.strategies import every_strategy, parametrize

pytestmark = [
    # NaN is not zero.
    pytest.mark.filterwarnings("ignore:Training ended at sparsity:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*pruned nothing:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*ckpt_path:UserWarning"),
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:Error detected in:UserWarning"),
]
STEP = 6  # index of the third batch in the second epoch of four batches
SICK = "net.6.weight"


class Sick(Classifier):
    """The loss of one batch, or the gradient of one weight in it, is not finite.

    Args:
        loss: What the loss is multiplied with.
        grad: What the gradient is made of.
        cure: Where the user notices, and leaves the batch out.
        alarm: Where the user notices, and gives up.
    """

    def __init__(self, *, loss=1.0, grad=None, cure=None, alarm=None):
        super().__init__()
        self.loss, self.grad, self.cure, self.alarm = loss, grad, cure, alarm

    @property
    def sick(self):
        return self.trainer.fit_loop.epoch_loop.total_batch_idx == STEP

    def training_step(self, batch, batch_idx):
        loss = self.compute_loss(batch)
        if self.sick:
            loss = loss * self.loss
        if not loss.isfinite() and self.cure == "training_step":
            return None
        return loss

    def on_after_backward(self):
        if self.sick and self.grad is not None:
            self.get_parameter(SICK).grad.fill_(self.grad)
        self.look("on_after_backward")

    def on_before_optimizer_step(self, optimizer):
        self.look("on_before_optimizer_step")

    def configure_gradient_clipping(self, *args, **kwargs):
        if self.alarm == "clipping":
            torch.nn.utils.clip_grad_norm_(self.parameters(), 1e6, error_if_nonfinite=True)

    def look(self, place):
        if all(p.grad is None or p.grad.isfinite().all() for p in self.parameters()):
            return
        if self.cure == place:
            self.zero_grad()
        if self.alarm == place:
            raise ValueError("The gradient is not finite.")


class Witness(LateProbe):
    """Remembers when the model was finite, and after every batch what steps have moved."""

    def __init__(self, sparse):
        super().__init__(sparse)
        self.finite, self.moved = [], []

    def look(self, hook, trainer, model):
        if hook in ("on_validation_end", "on_train_epoch_end", "on_train_end"):
            self.finite.append(bool(model.get_parameter(SICK).isfinite().all()))
        if hook == "on_train_batch_end":
            state = self.sparse.state_dict()
            learned = {name: packed["state"].get("s") for name, packed in state["latents"].items()}
            latents = {name: self.sparse.latent(name).clone() for name in self.sparse.targets}
            self.moved.append({"latents": latents, "learned": learned, "momentum": state["learner"]})


@pytest.mark.filterwarnings("ignore:.* has pruned all:UserWarning")  # what is not finite takes the whole budget
@every_strategy
@pytest.mark.parametrize("value", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.slow)])
def test_what_is_not_finite_is_never_pruned_away(setting, value):
    callback = setting.build()
    witness = Witness(callback)
    fit(Sick(grad=value), callback, Saver(), witness)
    # After the sanity check, after validation and at the end of every epoch, at the end of training.
    assert witness.finite == [True] + [True] * 2 + [False] * 5
    for epoch in range(3):
        weights = torch.load(f"epoch={epoch}.ckpt", weights_only=True)["state_dict"]
        assert weights[SICK].isfinite().all() == (epoch == 0)


@parametrize("ST3", "STR", "AutoSparse", "TopKGradientAnnealing", "GMP")
@pytest.mark.parametrize("cure", ["training_step", "on_after_backward", "on_before_optimizer_step"])
def test_a_batch_that_is_left_out_moves_nothing(setting, cure):
    callback = setting.build()
    probe, witness = Probe(callback), Witness(callback)
    fit(Sick(loss=float("nan"), cure=cure), probe, callback, LateProbe(callback), witness)
    assert all(witness.finite)
    same = [torch.equal(one["latents"][SICK], other["latents"][SICK]) for one, other in pairwise(witness.moved)]
    assert same[STEP - 1] or not callback.keeps_latent  # else the schedule has pruned more of the latents themselves
    assert sum(same) <= 1
    for key in ("learned", "momentum"):
        assert_same(witness.moved[STEP][key], witness.moved[STEP - 1][key])


@parametrize("ST3", "AutoSparse", "GMP")
@pytest.mark.parametrize(
    ("alarm", "error"),
    [("clipping", RuntimeError), ("on_before_optimizer_step", ValueError), ("anomaly", RuntimeError)],
)
def test_training_that_stops_at_nan_goes_on_from_before(setting, alarm, error):
    model, callback = Sick(loss=float("nan"), alarm=alarm), setting.build()
    flags = {"detect_anomaly": True} if alarm == "anomaly" else {}
    with pytest.raises(error, match=r"finite|nan values"):
        fit(model, Probe(callback), callback, Saver(), LateProbe(callback), **flags)
    assert_sparse(model, callback)
    assert all(callback.latent(name).isfinite().all() for name in callback.targets)

    ends = []
    for checkpoint in (f"step={STEP}.ckpt", None):
        model, callback = Sick(), setting.build()
        ends.append(outcome(fit(model, callback, ckpt_path=checkpoint), model, callback))
    assert_same(*ends)
