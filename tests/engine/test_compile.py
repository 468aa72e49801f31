"""`torch.compile`: the same weights as eagerly, and no recompilation because weights are swapped."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from tests.helpers.assertions import assert_same
from tests.helpers.models import Classifier, fit, make_net, snapshot
from tests.helpers.probes import Probe
from tests.helpers.strategies import SETTINGS


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


def make_model(example=True):
    model = Classifier(Net(), schedule=False)
    model.example_input_array = torch.zeros(1, 1, 6, 6) if example else None
    return model


def compile_net(model, backend):
    model.net = torch.compile(model.net, backend=backend)
    return model


def compile_in_place(model, backend):
    model.net.compile(backend=backend)
    return model


def compile_model(model, backend):
    return torch.compile(model, backend=backend)


def plain(state):
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}


def count_graphs(model, *callbacks):
    """Train; return how much had been compiled after each batch."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    frames = Frames()
    fit(model, *callbacks, frames)
    return frames.counts


@pytest.mark.parametrize(
    ("way", "name", "example"),
    [
        (compile_net, "ST3", True),
        (compile_net, "GMP", True),
        (compile_net, "AutoSparse", False),
        (compile_in_place, "AutoSparse", True),
        (compile_model, "ST3", True),
        (compile_model, "TopKGradientAnnealing", False),
    ],
)
def test_compiled_training_equals_eager_training_and_compiles_nothing_more(way, name, example):
    setting = SETTINGS[name]
    eager, alone = make_model(example), setting.build()
    fit(eager, alone)
    dense = count_graphs(way(make_model(example), "eager"))
    model, callback = make_model(example), setting.build()
    sparse = count_graphs(way(model, "eager"), Probe(callback), callback)
    assert_same(plain(snapshot(model)), plain(snapshot(eager)))
    assert callback.targets == alone.targets
    assert dense[1]["unique_graphs"] >= 1
    # The first batch runs eagerly where FLOPs are counted in it.
    first = 0 if example else 1
    assert sparse[first:] == dense[first:]


def test_ahead_of_time_autograd():
    runs = []
    for compiled in (False, True):
        model, callback = make_model(), SETTINGS["ST3"].build()
        fit(compile_net(model, "aot_eager") if compiled else model, callback, max_epochs=2)
        runs.append(plain(snapshot(model)))
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-4, atol=1e-5)
