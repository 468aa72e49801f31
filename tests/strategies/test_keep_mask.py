"""The zeros of anybody's sparse model are found and kept."""

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch import nn

from lightning_sparse import KeepMask
from tests.helpers.models import Classifier, fit, make_trainer
from tests.helpers.side_by_side import HOSTS, WEIGHTS, Net, assert_equal_training, hosts_and_dtypes, make_data
from tests.helpers.spent import SHAPE, OneLayer, assert_spent
from tests.helpers.strategies import Pruned
from tests.reference import dense_gradients as reference


@hosts_and_dtypes
def test_training_equals_the_equations(host, dtype):
    assert_equal_training(
        Pruned(0.6, verbose=False), lambda thetas: reference.KeepMask(thetas, WEIGHTS, 0.6), host=host, dtype=dtype
    )


def test_clipping_sees_the_masked_gradient():
    assert_equal_training(
        Pruned(0.6, verbose=False), lambda thetas: reference.KeepMask(thetas, WEIGHTS, 0.6), clip=0.01
    )


def test_exactly_the_zeros_of_the_model_are_kept():
    """Scattered ones, whole channels, and with the help of a name those of an embedding."""
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Linear(8, 3)))
    with torch.no_grad():
        model.net[1].weight[2] = 0.0
        model.net[2].weight.view(-1)[::3] = 0.0
    zeros = {name: p.detach() == 0 for name, p in model.named_parameters() if p.ndim == 2}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    callback = KeepMask(verbose=False)
    fit(model, callback)
    for name, parameter in model.named_parameters():
        changed = parameter.detach() != before[name]
        assert torch.equal(changed, ~zeros[name] if name in zeros else torch.ones_like(changed))
    assert callback.sparsity == sum(int(z.sum()) for z in zeros.values()) / sum(z.numel() for z in zeros.values())


def test_a_weight_that_starts_from_zero_trains_dense():
    net = Net(HOSTS["sgd"])
    nn.init.zeros_(net.head.weight)
    net.stem.weight.data[0] = 0.0
    with pytest.warns(UserWarning, match=r"`KeepMask` leaves `head\.weight` dense: all of it is zero"):
        make_trainer(KeepMask(verbose=False), max_epochs=2).fit(net, make_data())
    assert (net.head.weight != 0).all()
    assert (net.stem.weight[0] == 0).all()


def test_what_a_weight_that_starts_from_zero_has_not_heard_of_at_first_is_not_pruned():
    """One of the inputs is zero in the first batch, so that its weights are still zero after the first step."""
    model, batches = OneLayer(), [torch.randn(5, SHAPE[0]) for _ in range(4)]
    nn.init.zeros_(model.layer.weight)
    batches[0][:, 0] = 0.0
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    with pytest.warns(UserWarning, match="leaves"):
        make_trainer(KeepMask(verbose=False), max_epochs=1).fit(model, loader)
    assert (model.layer.weight != 0).all()


def test_a_dense_model_is_pointed_out():
    with pytest.warns(UserWarning, match="`KeepMask` has pruned nothing: the model has no zeros to keep"):
        fit(Classifier(), KeepMask(verbose=False))


def test_a_second_fit_keeps_the_first_zeros_of_a_weight_that_started_from_zero():
    """By then it has none, nor does it get any."""
    net, callback = Net(HOSTS["sgd"]), KeepMask(verbose=False)
    nn.init.zeros_(net.head.weight)
    net.stem.weight.data[0] = 0.0
    seen = []
    probe = LambdaCallback(on_train_batch_end=lambda *_: seen.append(callback.sparsity))
    with pytest.warns(UserWarning, match="leaves"):
        make_trainer(callback, max_epochs=1).fit(net, make_data())
    make_trainer(callback, probe, max_epochs=1).fit(net, make_data())
    assert set(seen) == {net.stem.weight[0].numel() / sum(net.get_parameter(name).numel() for name in WEIGHTS)}


def test_flops():
    assert_spent(Pruned(0.6, verbose=False), lambda step, density: density)
