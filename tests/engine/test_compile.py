"""`torch.compile`: the same weights as eagerly, and no recompilation because weights are swapped."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from tests.helpers.assertions import assert_same
from tests.helpers.models import Classifier, fit, make_net, snapshot
from tests.helpers.probes import Probe
from tests.helpers.strategies import SETTINGS, some_strategies


class Frames(Callback):
    """Counts what has been compiled after every batch."""

    def __init__(self):
        self.counts = []

    def on_train_batch_end(self, *args):
        self.counts.append(dict(torch._dynamo.utils.counters["stats"]))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = make_net(dropout=0.0)

    def forward(self, x):
        return self.layers(x)


def make_model():
    model = Classifier(Net(), schedule=False)
    model.example_input_array = torch.zeros(1, 1, 6, 6)
    return model


def compile_net(model, backend):
    model.net = torch.compile(model.net, backend=backend)
    return model


def compile_in_place(model, backend):
    model.net.compile(backend=backend)
    return model


def compile_model(model, backend):
    return torch.compile(model, backend=backend)


WAYS = [compile_net, compile_in_place, compile_model]


def plain(state):
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}


@some_strategies
@pytest.mark.parametrize("way", WAYS)
def test_compiled_training_equals_eager_training(setting, way):
    eager, alone = make_model(), setting.build()
    fit(eager, alone)
    model, callback, frames = make_model(), setting.build(), Frames()
    fit(way(model, "eager"), Probe(callback), frames, callback)
    assert_same(plain(snapshot(model)), plain(snapshot(eager)))
    assert callback.targets == alone.targets
    assert frames.counts[0]["unique_graphs"] >= 1
    # One graph for training and one for validation.
    assert [counts["unique_graphs"] for counts in frames.counts[5:]] == [frames.counts[4]["unique_graphs"]] * 7


@some_strategies
@pytest.mark.parametrize("way", WAYS)
def test_swapping_weights_compiles_nothing_anew(setting, way):
    counts = []
    for callbacks in ([], [setting.build()]):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        frames, model = Frames(), make_model()
        fit(way(model, "eager"), frames, *callbacks)
        counts.append(frames.counts)
    assert counts[1] == counts[0]


@pytest.mark.parametrize("way", WAYS)
def test_ahead_of_time_autograd(way):
    runs = []
    for compiled in (False, True):
        model, callback = make_model(), SETTINGS["ST3"].build(sparsity=0.5)
        fit(way(model, "aot_eager") if compiled else model, callback, max_epochs=2)
        runs.append(plain(snapshot(model)))
        assert callback.sparsity == pytest.approx(0.5, abs=0.01)
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-4, atol=1e-5)
