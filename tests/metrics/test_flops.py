"""The metric adds up counts, and behaves like any other metric."""

import pickle

import pytest
import torch
from torch import nn

from lightning_sparse.metrics import SparseFLOPs


@pytest.fixture
def net():
    net = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.Flatten(), nn.Linear(8, 3))
    with torch.no_grad():
        net[0].weight.fill_(1.0).view(-1)[:7] = 0.0  # of 18, each used at 4 positions
        net[2].weight.fill_(1.0).view(-1)[:4] = 0.0  # of 24
    return net


X = torch.randn(5, 1, 4, 4)
SPARSE, DENSE = 5 * (4 * 11 + 20), 5 * (4 * 18 + 24)


@pytest.mark.parametrize(("ratio", "expected"), [(False, SPARSE), (True, SPARSE / DENSE)])
def test_flops_and_ratio(net, ratio, expected):
    metric = SparseFLOPs(ratio=ratio)
    metric.update(net, X)
    assert metric.compute() == torch.tensor(expected)


def test_updates_add_up_and_reset_forgets(net):
    metric = SparseFLOPs()
    metric.update(net, X)
    metric.update(net, X[:1])
    assert metric.compute() == SPARSE + SPARSE // 5
    metric.reset()
    assert metric(net, X) == SPARSE


def test_billions_are_exact():
    layer = nn.Linear(2**15, 1, bias=False)
    metric = SparseFLOPs()
    for _ in range(3):
        metric.update(layer, torch.zeros(1).expand(2**10 + 1, 2**15))
    assert int(metric.compute()) == 3 * (2**10 + 1) * 2**15


def test_keyword_inputs(net):
    metric = SparseFLOPs()
    metric.update(net, input=X)
    assert metric.compute() == SPARSE


@pytest.mark.parametrize("copy", [lambda m: m.clone(), lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_settings_and_state(net, copy):
    metric = SparseFLOPs(ratio=True)
    metric.update(net, X)
    twin = copy(metric)
    twin.update(net, X)
    assert (int(metric.dense), int(twin.dense)) == (DENSE, 2 * DENSE)
    assert twin.compute() == metric.compute() == torch.tensor(SPARSE / DENSE)


def test_metric_inside_the_module_it_measures(net):
    net.metric = SparseFLOPs()
    net.forward = lambda x: net[2](net[1](net[0](x)))
    net.metric.update(net, X)
    assert net.metric.compute() == SPARSE
