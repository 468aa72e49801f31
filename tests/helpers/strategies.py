"""Every exported strategy with small settings, for the laws that hold for all of them."""

from dataclasses import dataclass, field
from typing import Any

import pytest

import lightning_sparse as ls
from lightning_sparse import SparseTraining


@dataclass(frozen=True)
class Setting:
    """One way to train a tiny model sparse.

    Attributes:
        method: The callback.
        kwargs: Its arguments; the ramp is over after half of the training.
        dense: Arguments with which it prunes nothing and passes the gradient on as it is.
        sparsity: Fraction of zeros that it ends with; None if that is an outcome.
    """

    method: type[SparseTraining]
    kwargs: dict[str, Any]
    dense: dict[str, Any] = field(default_factory=lambda: {"sparsity": 0.0})
    sparsity: float | None = None

    def build(self, **kwargs: Any) -> SparseTraining:
        return self.method(**{"verbose": False, **self.kwargs, **kwargs})

    def build_dense(self, **kwargs: Any) -> SparseTraining:
        return self.method(verbose=False, **self.dense, **kwargs)


_RAMP = {"start": 0.0, "end": 0.5}
# A threshold of exactly zero, which nothing moves.
_NO_THRESHOLD = {"threshold_init": -3200.0, "threshold_weight_decay": 0.0}
# A threshold that is felt at once and moves visibly within ten steps.
_THRESHOLD = {"threshold_init": -3.0, "threshold_weight_decay": 0.05}

SETTINGS = {
    "SparseTraining": Setting(SparseTraining, {"sparsity": 0.7, **_RAMP}, sparsity=0.7),
    "SparseTraining-masked": Setting(
        SparseTraining,
        {"sparsity": 0.7, **_RAMP, "gradient": "masked", "distribution": "uniform", "update_every_n_steps": 3},
        sparsity=0.7,
    ),
    "ST3": Setting(ls.ST3, {"sparsity": 0.7, **_RAMP}, sparsity=0.7),
    "ST3-freeze": Setting(ls.ST3, {"sparsity": 0.7, **_RAMP, "freeze": 0.6}, sparsity=0.7),
    "ST3Sigma": Setting(ls.ST3Sigma, {"sparsity": 0.7, **_RAMP}, sparsity=0.7),
    "STR": Setting(ls.STR, _THRESHOLD, _NO_THRESHOLD),
    "AutoSparse": Setting(ls.AutoSparse, {**_THRESHOLD, "alpha": 0.5, "alpha_reset": 0.7}, _NO_THRESHOLD),
    "TopKGradientAnnealing": Setting(
        ls.TopKGradientAnnealing, {"sparsity": 0.7, **_RAMP, "alpha_reset": 0.7, "backward_sparsity": 0.4}, sparsity=0.7
    ),
    "StaticSparsity": Setting(ls.StaticSparsity, {"sparsity": 0.7}, sparsity=0.7),
    "SET": Setting(ls.SET, {"sparsity": 0.7, "update_every_n_steps": 2}, sparsity=0.7),
    "RigL": Setting(ls.RigL, {"sparsity": 0.7, "update_every_n_steps": 2, "distribution": "uniform"}, sparsity=0.7),
    "GMP": Setting(ls.GMP, {"sparsity": 0.7, **_RAMP, "update_every_n_steps": 2}, sparsity=0.7),
}


def parametrize(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("setting", [SETTINGS[name] for name in names], ids=names)


every_strategy = parametrize(*SETTINGS)
# For what does not depend on the method: latents with a soft threshold, with a mask, with a learned threshold, and no
# latents at all.
some_strategies = parametrize("ST3", "TopKGradientAnnealing", "AutoSparse", "GMP")
