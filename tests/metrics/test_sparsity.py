"""The metric counts zeros, and behaves like any other metric."""

import pickle

import pytest
import torch
from torch import nn
from torchmetrics import MetricCollection

from lightning_sparse.metrics import SparseFLOPs, Sparsity


@pytest.fixture
def net():
    net = nn.Sequential(nn.Linear(10, 10), nn.BatchNorm1d(10), nn.Linear(10, 5))
    with torch.no_grad():
        net[0].weight.fill_(1.0).view(-1)[:25] = 0.0  # of 100
        net[2].weight.fill_(1.0).view(-1)[:5] = 0.0  # of 50
        net[2].bias.zero_()  # biases and norms are no targets
    return net


def test_fraction_of_zeros(net):
    metric = Sparsity()
    metric.update(net)
    assert metric.compute() == torch.tensor(30 / 150)


@pytest.mark.parametrize(("kwargs", "expected"), [({"targets": ["0"]}, 25 / 100), ({"ignore": ["0"]}, 5 / 50)])
def test_selection(net, kwargs, expected):
    metric = Sparsity(**kwargs)
    metric.update(net)
    assert metric.compute() == torch.tensor(expected)


def test_frozen_weights_are_counted(net):
    metric = Sparsity()
    metric.update(net.requires_grad_(False))
    assert metric.compute() == torch.tensor(30 / 150)


def test_tied_weights_are_counted_once():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    nn.init.zeros_(net[0].weight)
    nn.init.ones_(net[2].weight)
    metric = Sparsity()
    metric.update(net)
    assert metric.compute() == 0.5


def test_updates_add_up_and_reset_forgets(net):
    metric = Sparsity(targets=["0"])
    metric.update(net)
    nn.init.zeros_(net[0].weight)
    metric.update(net)
    assert metric.compute() == (25 + 100) / 200
    metric.reset()
    metric.update(net)
    assert metric.compute() == 1.0
    assert metric(net) == 1.0


def test_states_of_processes_are_summed(net):
    first, second = Sparsity(targets=["0"]), Sparsity(targets=["2"])
    first.update(net)
    second.update(net)
    states = {name: torch.stack([getattr(first, name), getattr(second, name)]) for name in ("zeros", "total")}
    for name, reduce in first._reductions.items():
        setattr(first, name, reduce(states[name]))
    assert first.compute() == torch.tensor(30 / 150)


@pytest.mark.parametrize("copy", [lambda m: m.clone(), lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_settings_and_state(net, copy):
    metric = Sparsity(ignore=["0"])
    metric.update(net)
    twin = copy(metric)
    twin.update(net)
    assert twin.ignore == ["0"]
    assert (int(metric.total), int(twin.total)) == (50, 100)
    assert twin.compute() == metric.compute()


def test_nothing_selected_is_nan():
    metric = Sparsity()
    metric.update(nn.BatchNorm1d(3))
    assert metric.compute().isnan()


def test_unknown_pattern_is_an_error(net):
    with pytest.raises(ValueError, match="layer9"):
        Sparsity(targets=["layer9"]).update(net)


def test_collection_holds_both_metrics(net):
    metrics = MetricCollection({"sparsity": Sparsity(), "flops": SparseFLOPs(), "ratio": SparseFLOPs(ratio=True)})
    for _ in range(2):  # from the second update on, metrics with the same state share it
        metrics.update(net, torch.randn(3, 10))
    result = metrics.compute()
    assert result["sparsity"] == torch.tensor(30 / 150)
    assert result["flops"] == 2 * 3 * 120
    assert result["ratio"] == torch.tensor(120 / 150)


def test_metric_inside_the_module_it_measures(net):
    net.metric = Sparsity()
    net.metric.update(net)
    assert net.metric.compute() == torch.tensor(30 / 150)
