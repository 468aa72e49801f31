"""OptG against autograd through a straight-through mask, with full sorts of the scores when an epoch begins."""

import torch
from lightning.pytorch.callbacks import LambdaCallback

from lightning_sparse import OptG
from lightning_sparse.engine.latent import Context, Latent
from tests.helpers.models import make_trainer
from tests.helpers.side_by_side import EPOCHS, HOSTS, WEIGHTS, Net, assert_equal_training, hosts_and_dtypes, make_data
from tests.helpers.spent import assert_spent
from tests.reference import scores as reference

SIZE = sum(p.numel() for name, p in Net(None).named_parameters() if name in WEIGHTS)


def twin(epochs=EPOCHS, pools=((WEIGHTS, 0.7),), **settings):
    return lambda thetas: reference.OptG(thetas, pools, epochs=epochs, **settings)


@hosts_and_dtypes
def test_training_equals_autograd(host, dtype):
    assert_equal_training(OptG(0.7, verbose=False), twin(), host=host, dtype=dtype)


def test_scores_are_clipped_by_a_norm_of_their_own():
    assert_equal_training(
        OptG(0.7, beta=0.3, verbose=False), twin(25, beta=0.3), epochs=25, accumulate=3, clip=0.003, interval="epoch"
    )


def test_own_budgets():
    pools = ((["stem.weight"], 0.3), (["depthwise.weight", "grouped.weight"], 0.7))
    callback = OptG(0.7, overrides={"stem": {"sparsity": 0.3}, "head": None}, verbose=False)
    assert_equal_training(callback, twin(pools=pools))


def watch(callback, epochs, **flags):
    """The zeros of the model after each batch and in each validation, and at the end."""
    trained, validated = [], []

    def look(rows, model):
        rows.append(torch.cat([model.get_parameter(name).detach().flatten() == 0 for name in WEIGHTS]))

    net = Net(HOSTS["sgd"])
    net.validation_step = lambda batch, batch_idx: None
    probe = LambdaCallback(
        on_train_batch_end=lambda trainer, model, *_: look(trained, model),
        on_validation_epoch_start=lambda trainer, model: look(validated, model),
    )
    make_trainer(callback, probe, max_epochs=epochs, num_sanity_val_steps=0, **flags).fit(net, make_data(), make_data())
    return trained, validated


def test_weights_are_chosen_between_the_validation_of_an_epoch_and_the_next_one():
    callback = OptG(0.7, beta=2.0, verbose=False)
    trained, validated = watch(callback, 4)
    for epoch, share in enumerate([0.0, 1 / (1 + torch.e**2), 0.5, 1.0]):
        assert int(validated[epoch].sum()) == round(share * 0.7 * SIZE)
        assert all(torch.equal(zeros, validated[epoch]) for zeros in trained[10 * epoch : 10 * epoch + 10])
    assert callback.target_reached


def test_a_ramp_within_the_first_epoch_prunes_at_its_end():
    trained, _ = watch(OptG(0.7, end=0.25, verbose=False), 2)
    assert [int(zeros.sum()) for zeros in trained[:10]] == [0] * 4 + [round(0.7 * SIZE)] * 6
    assert len({tuple(zeros.tolist()) for zeros in trained[4:10]}) == 1


def test_after_the_ramp_weights_are_still_exchanged():
    trained, _ = watch(OptG(0.7, end=2, verbose=False), 4)
    assert {int(zeros.sum()) for zeros in trained[10:]} == {round(0.7 * SIZE)}
    assert len({tuple(zeros.tolist()) for zeros in trained[10:]}) == 3


def test_without_scores_magnitudes_serve():
    theta = torch.tensor([[3.0, -0.5], [2.0, -4.0]])
    callback = OptG(0.5)
    latent = Latent("w", "w", torch.empty(2, 2), theta, callback.init_state(theta))
    now = Context(0, 5, 6, 0.9, position=5.0)
    assert torch.equal(callback.select([latent], 0.5, now)[0]["mask"], torch.tensor([[True, False], [False, True]]))


def test_gradients_are_dense():
    assert_spent(OptG(0.9, verbose=False), lambda step, density: 1.0)
