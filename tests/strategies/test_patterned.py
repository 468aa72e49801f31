"""Methods with weights in groups against their equations: norms and masks group by group, gradients by autograd."""

import re
from typing import get_args, get_type_hints

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_sparse import (
    LATS,
    ST3,
    IterativeMagnitudePruning,
    Powerpropagation,
    ST3Sigma,
    StaticSparsity,
    TopKAST,
    strategies,
)
from lightning_sparse.engine.callback import Patterned
from lightning_sparse.functional import parse_pattern
from tests.engine.test_patterns import DEPTHWISE, FITTING, GROUPED, HEAD, STEM
from tests.helpers.models import Classifier, Loader, make_trainer
from tests.helpers.side_by_side import HOSTS, Net, assert_equal_training, make_data
from tests.reference import dense_gradients
from tests.reference import patterned as reference
from tests.reference import training as plain
from tests.reference.functional import patterned_masks

SPARSITY = {"1:2": 0.5, "1:4": 0.75, "channel": 0.4, "block:2x2": 0.4, "block:4x1": 0.57}
WHEN = {"start": 1, "end": 8}
# Without its outputs the network would learn nothing.
NAMES = {**FITTING, "channel": [STEM, DEPTHWISE, GROUPED], "block:1x1": FITTING["channel"]}


def common(pattern):
    budget = {"sparsity": SPARSITY.get(pattern, 0.6)} if parse_pattern(pattern).sparsity is None else {}
    return {"pattern": pattern, "ignore": [HEAD] * (pattern == "channel"), "verbose": False, **budget}


def pools(pattern, *, each=False):
    names, sparsity = NAMES[pattern], SPARSITY.get(pattern, 0.6)
    return [([name], sparsity) for name in names] if each else [(names, sparsity)]


@pytest.mark.parametrize(
    ("pattern", "host", "dtype"),
    [
        ("channel", "sgd", torch.float64),
        ("channel", "adamw", torch.float32),
        ("block:4x1", "nesterov", torch.float64),
        ("1:2", "adamw", torch.float64),
    ],
)
def test_st3_equals_the_equations(pattern, host, dtype):
    assert_equal_training(
        ST3(**common(pattern), **WHEN),
        lambda thetas: reference.GroupedST3(thetas, pools(pattern), pattern=pattern, **WHEN),
        host=host,
        dtype=dtype,
    )


@pytest.mark.parametrize("pattern", ["block:4x1", "1:4"])
def test_st3_sigma_equals_the_equations(pattern):
    assert_equal_training(
        ST3Sigma(**common(pattern), **WHEN),
        lambda thetas: reference.GroupedST3(thetas, pools(pattern), pattern=pattern, sigma=True, **WHEN),
    )


@pytest.mark.parametrize("pattern", ["channel", "1:2"])
def test_thresholds_of_every_fifth_step(pattern):
    """In between the weights move on, and an n:m mask stays one."""
    assert_equal_training(
        ST3(**common(pattern), **WHEN, update_every_n_steps=5, rescale=False),
        lambda thetas: reference.GroupedST3(thetas, pools(pattern), pattern=pattern, every=5, rescale=False, **WHEN),
    )


def test_freezing():
    assert_equal_training(
        ST3(**common("block:2x2"), start=1, end=6, freeze=9),
        lambda thetas: reference.GroupedST3(
            thetas, pools("block:2x2"), pattern="block:2x2", start=1, end=6, fix_from=9
        ),
        clip=0.5,
    )


@pytest.mark.parametrize("method", [ST3, ST3Sigma])
def test_groups_of_one_are_weights(method):
    """The norm of a group of one is its magnitude: ST-3 itself, the rescaling included."""
    assert_equal_training(
        method(**common("block:1x1"), **WHEN),
        lambda thetas: plain.ST3(thetas, pools("block:1x1"), sigma=method is ST3Sigma, **WHEN),
    )


@pytest.mark.parametrize(
    ("pattern", "host", "dtype"),
    [("channel", "sgd", torch.float64), ("block:2x2", "adamw", torch.float32), ("1:2", "nesterov", torch.float64)],
)
def test_powerpropagation_equals_the_equations(pattern, host, dtype):
    """Groups compete by the mean of their powers, which order otherwise than the means of the latents."""
    assert_equal_training(
        Powerpropagation(**common(pattern), **WHEN, power=2.0, distribution="uniform", update_every_n_steps=30),
        lambda thetas: reference.GroupedPowerpropagation(
            thetas, pools(pattern, each=True), pattern=pattern, power=2.0, every=30, **WHEN
        ),
        host=host,
        dtype=dtype,
    )


@pytest.mark.parametrize(
    ("pattern", "power", "host"), [("channel", 1.0, "sgd"), ("block:4x1", 1.5, "nesterov"), ("1:4", 1.0, "adamw")]
)
def test_topkast_equals_the_equations(pattern, power, host):
    """Weights that are outside the larger set, which consists of groups, too, stay where they are."""
    sparsity = SPARSITY.get(pattern, 0.6)
    settings = {"backward_sparsity": 0.3, "exploration_loss": 0.01, "power": power, "update_every_n_steps": 7}
    assert_equal_training(
        TopKAST(**common(pattern), **settings, end=10),
        lambda thetas: reference.GroupedTopKAST(
            thetas,
            pools(pattern, each=True),
            pattern=pattern,
            outside=dict.fromkeys(NAMES[pattern], 0.3),
            strength=0.01,
            density=1 - sparsity,
            power=power,
            end=10,
            every=7,
        ),
        host=host,
    )


@pytest.mark.parametrize("pattern", ["channel", "block:2x2", "1:2"])
def test_static_masks_equal_the_equations(pattern):
    assert_equal_training(
        StaticSparsity(**common(pattern), distribution="uniform", seed=3),
        lambda thetas: reference.GroupedStatic(
            thetas, {names[0]: share for names, share in pools(pattern, each=True)}, pattern=pattern, seed=3
        ),
    )


def test_lats_equals_the_equations():
    """Its threshold is prescribed; there is nothing to share out."""

    class Prescribed(reference.GroupedST3):
        def choose(self, share):
            self.tau = dict.fromkeys(self.names, plain_lats.tau)

        def after_step(self, epoch, batch, batches):
            plain_lats.after_step(epoch, batch, batches)
            super().after_step(epoch, batch, batches)

    plain_lats = dense_gradients.LATS({}, [], final=0.12, epochs=12)
    assert_equal_training(
        LATS(threshold=0.12, **{key: value for key, value in common("channel").items() if key != "sparsity"}),
        lambda thetas: Prescribed(thetas, pools("channel"), pattern="channel", start=0, end=0, rescale=False),
    )


@pytest.mark.parametrize("rewind", ["weights", "learning_rate"])
@pytest.mark.parametrize("pattern", ["channel", "1:4"])
def test_iterative_pruning_keeps_the_largest_groups_of_those_that_are_left(pattern, rewind):
    """Each round keeps the same fraction of what is left, and nothing comes back."""
    callback, net = (
        IterativeMagnitudePruning(**common(pattern), rounds=3, epochs_per_round=2, rewind=rewind),
        Net(HOSTS["sgd"]),
    )
    seen = []  # weights before, and masks after a round

    class Rounds(Callback):
        def on_train_epoch_end(self, *args):
            seen.append([net.get_parameter(name).detach().clone() for name in callback.targets])

    make_trainer(Rounds(), callback, max_epochs=6).fit(net, make_data())
    sparsity = SPARSITY[pattern]
    for done in (1, 2):
        before, after = seen[2 * done - 1], seen[2 * done]
        kept = reference.count_kept(before, pattern, 1 - (1 - sparsity) ** (done / 2))
        if pattern == "channel":  # of different sizes
            sizes = [t[0].numel() for t in before for _ in t]
            order = torch.cat([t.abs().flatten(1).mean(1) for t in before]).argsort(descending=True).tolist()
            left = round((1 - sparsity) ** (done / 2) * sum(t.numel() for t in before))
            bought = torch.tensor([sizes[i] for i in order]).cumsum(0)
            kept = int((bought <= left).sum())
        for mask, weight in zip(patterned_masks(before, kept, pattern), after, strict=True):
            assert torch.equal(weight != 0, mask)


def test_whole_outputs_of_a_trained_network_are_zero():
    """What the pattern is for: they may be removed, bias and batch normalisation aside, and nothing changes."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, bias=False),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    model, callback = Classifier(net), ST3(0.5, pattern="channel", ignore=["net.5"], verbose=False)
    make_trainer(callback, max_epochs=4).fit(model, Loader(), Loader())
    images = torch.randn(5, 1, 6, 6)
    first, second = net[0](images), net[2](net[1](net[0](images)))
    dead = [~first.any(3).any(2).any(0), ~second.any(3).any(2).any(0)]
    assert [
        torch.equal(flags, ~callback.mask(name).flatten(1).any(1))
        for flags, name in zip(dead, callback.targets, strict=True)
    ]
    pruned = sum(
        int(flags.sum()) * weight[0].numel() for flags, weight in zip(dead, (net[0].weight, net[2].weight), strict=True)
    )
    total = net[0].weight.numel() + net[2].weight.numel()
    assert 0.5 * total <= pruned <= 0.5 * total + 144  # to the channel
    alive = [~flags for flags in dead]
    small = nn.functional.conv2d(images, net[0].weight[alive[0]]).relu()
    small = nn.functional.conv2d(small, net[2].weight[alive[1]][:, alive[0]]).relu()
    small = small.flatten(1) @ net[5].weight.view(3, 16, 4)[:, alive[1]].flatten(1).T + net[5].bias
    torch.testing.assert_close(small, net(images))


TAKES = {name: getattr(strategies, name) for name in strategies.__all__}


@pytest.mark.parametrize("name", TAKES)
def test_a_method_says_whether_it_takes_patterns(name):
    """What the signature shows is what is done; a pattern is never ignored."""
    method = TAKES[name]
    hints = get_type_hints(method.__init__)
    shown = "pattern" in hints or get_args(hints.get("common")) == (Patterned,)
    assert method.serves_patterns == shown
    if shown:
        pattern = "1:2" if name == "SSTE" else "channel"
        assert method(pattern=pattern).pattern == parse_pattern(pattern)
    else:
        message = f"`pattern` to be 'unstructured' for `{name}`, but got 'channel'. Use a method that takes patterns"
        with pytest.raises(ValueError, match=re.escape(message)):
            method(pattern="channel")


def test_a_prescribed_threshold_reaches_no_number_of_weights():
    with pytest.raises(ValueError, match="Expected argument `pattern` to be 'block:AxB' or 'channel', but got '2:4'"):
        LATS(pattern="2:4")
