"""Budgets in FLOPs, parameters or bytes are met to the weight, whoever shares them, and no layer falls too low."""

import io
import math
import re
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_sparse import (
    ACDC,
    GMP,
    LAMP,
    MEST,
    ST3,
    GraNet,
    Powerpropagation,
    RigL,
    SparseTraining,
    ST3Sigma,
    StaticSparsity,
    StraightThroughMagnitude,
    TopKAST,
    TopKGradientAnnealing,
)
from lightning_sparse.engine.budgets import hold_minimum
from lightning_sparse.engine.latent import Latent
from lightning_sparse.flops import count_flops
from lightning_sparse.functional.sharding import whole
from tests.helpers.assertions import assert_same
from tests.helpers.models import Loader, make_trainer
from tests.helpers.ranks import SaveAtEpoch, SpreadClassifier, keep, spawn

# Which layers suffer is not what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:.*has pruned all:UserWarning")
RAMP = {"start": 0.0, "end": 0.5}
OFTEN = {"update_every_n_steps": 2}


class Net(L.LightningModule):
    """Weights that cost 64, 16, 4 and 1 multiply-accumulates each, a dense norm, biases and an unused layer."""

    def __init__(self, example=True, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1, dtype=dtype),
            nn.BatchNorm2d(6, dtype=dtype),
            nn.SiLU(),
            nn.Conv2d(6, 8, 3, stride=2, padding=1, dtype=dtype),
            nn.SiLU(),
            nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2, bias=False, dtype=dtype),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(32, 5, dtype=dtype),
        )
        self.unused, self.dtype_ = nn.Linear(3, 3, dtype=dtype), dtype
        if example:
            self.example_input_array = torch.randn(3, 2, 8, 8, dtype=dtype)

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def train(callback, net=None, **flags):
    net = Net() if net is None else net
    data = [(torch.randn(4, 2, 8, 8, dtype=net.dtype_), torch.randint(0, 5, (4,))) for _ in range(5)]
    make_trainer(callback, max_epochs=4, **flags).fit(net, torch.utils.data.DataLoader(data, batch_size=None))
    return net


def dearest(net, **unit):
    """What the dearest kept weight adds, in the unit."""
    if "flops" in unit:
        count = count_flops(net, net.example_input_array)
        sizes = {name: net.get_parameter(name).numel() for name in count.by_layer}
        return max(macs / sizes[name] for name, macs in count.by_layer.items()) / count.dense
    return 1 if "parameters" in unit else 4


def remains(net, callback, unit):
    """Counted in the model, by hand."""
    if unit == "flops":
        count = count_flops(net, net.example_input_array)
        return count.sparse / count.dense
    targets = {id(net.get_parameter(name)) for name in callback.targets}
    kept = sum(int((p != 0).sum()) for p in net.parameters() if id(p) in targets)
    if unit == "parameters":
        return kept + sum(p.numel() for p in net.parameters() if id(p) not in targets)
    others = [t for t in net.state_dict(keep_vars=True).values() if id(t) not in targets]
    bits = sum(math.ceil(p.numel() / 8) for p in net.parameters() if id(p) in targets)
    return bits + kept * 4 + sum(t.numel() * t.element_size() for t in others)


GLOBAL = {
    "hard": lambda **unit: SparseTraining(**RAMP, **unit),
    "soft": lambda **unit: SparseTraining(projection="soft", **RAMP, **unit),
    "ST3": lambda **unit: ST3(**RAMP, **unit),
    "ST3-freeze": lambda **unit: ST3(**RAMP, freeze=0.6, **unit),
    "ST3Sigma": lambda **unit: ST3Sigma(**RAMP, **unit),
    "GMP": lambda **unit: GMP(distribution="global", **RAMP, **OFTEN, **unit),
    "LAMP": lambda **unit: LAMP(**RAMP, **OFTEN, **unit),
    "GraNet": lambda **unit: GraNet(**RAMP, **OFTEN, **unit),
    "GraNet-sparse": lambda **unit: GraNet(initial_sparsity=0.2, **RAMP, **OFTEN, **unit),
    "Powerpropagation": lambda **unit: Powerpropagation(**RAMP, **OFTEN, **unit),
    "TopKGradientAnnealing": lambda **unit: TopKGradientAnnealing(distribution="global", **RAMP, **unit),
    "ACDC": lambda **unit: ACDC(start=0.1, end=0.7, sparse_phase=0.2, dense_phase=0.1, **unit),
}
SPLIT = {
    "uniform": lambda **unit: SparseTraining(distribution="uniform", **RAMP, **unit),
    "er": lambda **unit: StraightThroughMagnitude(distribution="er", **unit),
    "erk": lambda **unit: SparseTraining(distribution="erk", projection="soft", **RAMP, **unit),
    "StaticSparsity": lambda **unit: StaticSparsity(**unit),
    "RigL": lambda **unit: RigL(**OFTEN, **unit),
    "MEST": lambda **unit: MEST(mutation={0.0: 0.1, 0.5: 0.0}, **OFTEN, **unit),
    "TopKAST": lambda **unit: TopKAST(**OFTEN, **unit),
}
UNITS = [{"flops": 0.2}, {"parameters": 300}, {"bytes": 1500}]
others = [pytest.param(unit, marks=pytest.mark.slow, id=next(iter(unit))) for unit in UNITS[1:]]
units = pytest.mark.parametrize("unit", [pytest.param(UNITS[0], id="flops"), *others])


@units
@pytest.mark.parametrize("method", GLOBAL)
def test_a_shared_budget_is_met_to_the_weight(method, unit):
    callback = GLOBAL[method](verbose=False, **unit)
    net = train(callback)
    ((name, amount),) = unit.items()
    found = remains(net, callback, name)
    # Weights that grow in the last steps start from zero.
    slack = 12 * dearest(net, **unit) if "GraNet" in method else dearest(net, **unit)
    assert amount - slack < found <= amount * (1 + 1e-12)
    assert callback.target_reached
    report = callback.report().totals
    assert report[f"{name}/target"] == pytest.approx(amount, abs=dearest(net, **unit))
    assert report["flops/inference_ratio" if name == "flops" else f"{name}/total"] == pytest.approx(found)
    assert ("sparsity/target" in report) == (name != "flops")


@units
@pytest.mark.parametrize("method", SPLIT)
def test_budgets_of_layers_are_met_to_the_weight_of_each(method, unit):
    callback = SPLIT[method](verbose=False, **unit)
    net = train(callback)
    ((name, amount),) = unit.items()
    found, slack = remains(net, callback, name), len(callback.targets) * dearest(net, **unit)
    if method in ("StaticSparsity", "RigL", "MEST"):
        slack *= 4  # new weights that are zero still
    assert amount - slack < found <= amount * (1 + 1e-12)
    assert callback.target_reached
    if method == "uniform":
        densities = [float((net.get_parameter(target) != 0).float().mean()) for target in callback.targets]
        sizes = [net.get_parameter(target).numel() for target in callback.targets]
        wanted = 1 - callback.final_sparsity
        assert all(-1 < (density - wanted) * size <= 1e-6 for density, size in zip(densities, sizes, strict=True))


def test_weights_that_cost_much_do_not_lose_to_others_of_equal_size():
    # All compete by magnitude alone: what is kept is the longest prefix of the sorted weights that fits.
    callback = SparseTraining(flops=0.3, gradient="straight_through", verbose=False, **RAMP)
    net = train(callback)
    kept = min(float(callback.latent(name)[callback.mask(name)].abs().min()) for name in callback.targets)
    pruned = max(float(callback.latent(name)[~callback.mask(name)].abs().max()) for name in callback.targets)
    assert kept >= pruned
    assert net.unused.weight.count_nonzero() > 0  # costs nothing, competes nevertheless


@pytest.mark.parametrize("unit", UNITS[1:])
def test_other_units_are_met_by_thresholds_and_masks(unit):
    for method in ("ST3", "GMP"):
        test_a_shared_budget_is_met_to_the_weight(method, unit)


def test_bytes_are_those_of_weights_in_half_precision():
    callback = ST3(bytes=900, verbose=False, **RAMP)
    net = train(callback, Net(dtype=torch.bfloat16), precision="bf16-true")
    stored = io.BytesIO()
    kept = [net.get_parameter(name)[net.get_parameter(name) != 0] for name in callback.targets]
    bits = [torch.zeros(math.ceil(net.get_parameter(name).numel() / 8), dtype=torch.uint8) for name in callback.targets]
    others = [tensor for name, tensor in net.state_dict().items() if name not in callback.targets]
    assert sum(t.numel() * t.element_size() for t in [*kept, *bits, *others]) <= 900
    torch.save([*kept, *bits, *others], stored)
    assert callback.target_reached


def test_own_budgets_count_towards_the_whole():
    callback = SparseTraining(
        flops=0.25, verbose=False, **RAMP, ignore=["layers.8"], overrides={"layers.3": {"sparsity": 0.5}}
    )
    net = train(callback)
    found = remains(net, callback, "flops")
    assert 0.25 - dearest(net, flops=0.25) < found <= 0.25
    assert int((net.layers[3].weight == 0).sum()) == net.layers[3].weight.numel() // 2


def test_the_ramp_runs_over_the_costs():
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append((callback.metrics()["flops/target"], remains(pl_module, callback, "flops")))

    callback, watch = SparseTraining(flops=0.2, schedule="linear", verbose=False, **RAMP), Watch()
    net = Net()
    data = [(torch.randn(4, 2, 8, 8), torch.randint(0, 5, (4,))) for _ in range(5)]
    trainer = make_trainer(callback, watch, max_epochs=4)
    trainer.fit(net, torch.utils.data.DataLoader(data, batch_size=None))
    slack = dearest(net, flops=0.2)
    for step, (target, found) in enumerate(seen[:10], 1):
        assert target == pytest.approx(1 - 0.8 * step / 10, abs=slack)
        assert target - slack < found <= target + 1e-9
    assert seen[-1][0] == pytest.approx(0.2, abs=slack)


def test_a_generous_budget_prunes_nothing():
    callback = ST3(parameters=10**6, verbose=False, **RAMP)
    net = train(callback)
    assert callback.sparsity == 0.0
    assert callback.target_reached
    assert all(parameter.count_nonzero() for parameter in net.parameters())


def test_a_target_that_is_not_reached_is_told_in_its_unit():
    callback = ST3(flops=0.2, start=0, end=50, verbose=False)
    with pytest.warns(UserWarning, match=r"before `ST3` reached `flops=0.2`"):
        train(callback)
    assert not callback.target_reached


# --- a minimum for each layer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "unit", [{"sparsity": 0.8}, *(pytest.param(unit, marks=pytest.mark.slow) for unit in UNITS[:2])]
)
@pytest.mark.parametrize("method", ["hard", "soft", "ST3", "ST3Sigma", "GMP", "LAMP", "GraNet", "ACDC"])
def test_no_layer_falls_below_its_minimum_and_the_total_is_exact(method, unit):
    free, held = (GLOBAL[method](verbose=False, **unit, **more) for more in ({}, {"minimum_density": 0.15}))
    net, other = train(held, squeezed()), train(free, squeezed())
    masks = {name: held.mask(name) for name in held.targets}
    lacking = [name for name, mask in masks.items() if int(mask.sum()) < math.ceil(0.15 * mask.numel())]
    assert lacking == []
    loose = {name: free.mask(name) for name in free.targets}
    assert any(int(mask.sum()) < math.ceil(0.15 * mask.numel()) for mask in loose.values())
    ((name, amount),) = unit.items()
    if name == "sparsity":
        pruned = sum(int((~mask).sum()) for mask in masks.values())
        size = sum(mask.numel() for mask in masks.values())
        assert abs(pruned - 0.8 * size) <= 1 + (0 if method in ("hard", "GMP", "LAMP", "GraNet", "ACDC") else 1)
    else:
        slack = dearest(net, **unit) * (12 if method == "GraNet" else 2 if "flops" in unit else 1)
        assert amount - slack < remains(net, held, name) <= amount * (1 + 1e-12)
    assert held.target_reached
    assert remains(other, free, "parameters") > 0


def squeezed():
    """Small weights in one layer, of which magnitudes alone would leave nothing."""
    net = Net()
    net.layers[5].weight.data.mul_(0.01)
    return net


@pytest.mark.parametrize("distribution", ["uniform", "er", "erk"])
def test_a_minimum_where_layers_have_budgets_of_their_own(distribution):
    callback = StraightThroughMagnitude(0.8, distribution=distribution, minimum_density=0.19, verbose=False)
    train(callback)
    kept = {name: int(callback.mask(name).sum()) for name in callback.targets}
    sizes = {name: callback.mask(name).numel() for name in callback.targets}
    assert all(kept[name] >= math.ceil(0.19 * sizes[name]) for name in kept)
    assert sum(kept.values()) == pytest.approx(0.2 * sum(sizes.values()), abs=len(kept))


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"sparsity": 0.8, "flops": 0.2},
            ValueError,
            "Expected one argument for the budget, but got {'spars",
        ),
        ({"flops": 0.2, "bytes": 100}, ValueError, "Expected one argument for the budget, but got {"),
        ({"flops": 0}, ValueError, "Expected argument `flops` to be more than 0, but got 0."),
        ({"flops": 1.1}, ValueError, "Expected argument `flops` to lie in [0, 1], but got 1.1."),
        ({"parameters": 0.5}, TypeError, "Expected argument `parameters` to be a positive int, but got 0.5."),
        ({"bytes": -3}, ValueError, "Expected argument `bytes` to be a positive int, but got -3."),
        ({"minimum_density": 1.0}, ValueError, "Expected argument `minimum_density` to lie in [0, 1), but got 1.0."),
    ],
)
def test_mistakes(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        ST3(**arguments)


def test_the_default_sparsity_may_stand_beside_a_unit():
    assert ST3(0.9, flops=0.2).final_sparsity is None
    with pytest.raises(ValueError, match="Keep one of them"):
        TopKAST(0.9, flops=0.2)  # whose default is another one


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parameters": 34}, "Expected argument `parameters` to be more than 34, which remains whatever is pruned"),
        ({"flops": 0.001, "ignore": ["layers.3"]}, "Expected argument `flops` to be more than 0."),
        ({"flops": 0.2, "overrides": {"layers.3": {"sparsity": 0.0}}}, "Expected argument `flops` to be more than 0."),
        ({"sparsity": 0.95, "minimum_density": 0.1}, "Expected argument `minimum_density` to leave room for a budget"),
        (
            {"flops": 0.1, "minimum_density": 0.2},
            "room for a budget of `flops=0.1`, but got 0.2, which keeps 2",
        ),
    ],
)
def test_what_cannot_be_reached_is_told_with_numbers(arguments, message):
    with pytest.raises(MisconfigurationException, match=re.escape(message)):
        train(ST3(verbose=False, **arguments))


def test_flops_of_what_cannot_be_traced_are_counted_layer_by_layer():
    class Untraceable(Net):
        def forward(self, x):
            if torch.jit.is_tracing():
                raise RuntimeError
            return super().forward(x)

    callback = ST3(flops=0.2, verbose=False, **RAMP)
    net = train(callback, Untraceable())
    assert 0.2 - dearest(net, flops=0.2) < remains(net, callback, "flops") <= 0.2


def test_flops_are_counted_before_training_or_not_at_all():
    with pytest.raises(MisconfigurationException, match="from an `example_input_array` that the LightningModule has"):
        train(ST3(flops=0.2, verbose=False), Net(example=False))


# --- over many ranks, and resumed ------------------------------------------------------------------------------------


class Priced(SpreadClassifier):
    """Weights that cost differently."""

    example_input_array = torch.randn(2, 1, 6, 6)


def train_priced(layout: str) -> dict[str, torch.Tensor]:
    """Masks after training with a budget in FLOPs."""
    strategy = {"one": "auto", "ddp": "ddp", "fsdp": ModelParallelStrategy(2, 1)}[layout]
    callback = SparseTraining(flops=0.4, minimum_density=0.1, verbose=False, **RAMP)
    trainer = make_trainer(callback, strategy=strategy, devices=1 if layout == "one" else 2)
    trainer.fit(Priced(), Loader(), Loader())
    assert callback.target_reached
    return {name: whole(callback.mask(name)) for name in callback.targets}


def train_spread(folder: Path) -> None:
    for layout in ("ddp", "fsdp"):
        keep(train_priced(layout), folder / layout)


@pytest.mark.slow
def test_ranks_agree_on_a_budget_in_flops(tmp_path):
    expected = train_priced("one")
    spawn(train_spread, 2, tmp_path)
    for layout in ("ddp", "fsdp"):
        assert_same(torch.load(tmp_path / layout), expected)


def test_a_resumed_run_keeps_to_the_budget(tmp_path):
    def once(**flags):
        model, callback = Net(), ST3(flops=0.2, verbose=False, start=0, end=3)
        torch.manual_seed(1)
        data = [(torch.randn(4, 2, 8, 8), torch.randint(0, 5, (4,))) for _ in range(5)]
        trainer = make_trainer(callback, SaveAtEpoch(tmp_path / "half.ckpt"), max_epochs=4)
        trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=None), **flags)
        return {**model.state_dict(), **callback.metrics()}

    assert_same(once(), once(ckpt_path=tmp_path / "half.ckpt"))


def test_a_layer_that_is_one_weight_short_is_held():
    """The other gives up what is left of the budget: 12 of 20 weights go, 7 of them here."""
    latents = [Latent(name, name, torch.zeros(10), None) for name in ("short", "other")]

    def allocate(some, sparsity):
        return [2 if len(some) == 2 and x.name == "short" else round((1 - sparsity) * 10) for x in some]

    assert hold_minimum(latents, 0.6, 0.3, allocate, lambda latent, kept: kept) == [3, 5]
