"""Every exported strategy with small settings, for the laws that hold for all of them."""

from dataclasses import dataclass, field
from typing import Any

import pytest
from torch import Tensor

import lightning_sparse as ls
from lightning_sparse import SparseTraining, functional


@dataclass(frozen=True)
class Setting:
    """One way to train a tiny model sparse.

    Attributes:
        method: The callback.
        kwargs: Its arguments; the ramp is over after half of the training.
        dense: Arguments with which it prunes nothing and passes the gradient on as it is.
        sparsity: Fraction of zeros that it ends with; None if that is an outcome.
        unheard: Arguments with which weights that get no gradient live on, some of them.
    """

    method: type[SparseTraining]
    kwargs: dict[str, Any]
    dense: dict[str, Any] = field(default_factory=lambda: {"sparsity": 0.0})
    sparsity: float | None = None
    unheard: dict[str, Any] = field(default_factory=dict)

    def build(self, **kwargs: Any) -> SparseTraining:
        return self.method(**{"verbose": False, **self.kwargs, **kwargs})

    def build_dense(self, **kwargs: Any) -> SparseTraining:
        return self.method(verbose=False, **self.dense, **kwargs)


class Pruned(ls.KeepMask):
    """For a model with zeros: the smallest of each weight are zero before training."""

    def __init__(self, zeros: float = 0.7, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.zeros = zeros

    def init_state(self, theta: Tensor) -> dict[str, Tensor]:
        mask = functional.topk_masks([theta], theta.numel() - round(self.zeros * theta.numel()))[0]
        functional.hard_threshold(theta, mask, out=theta)
        return {}


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
    "SparseTraining-minimum": Setting(
        SparseTraining, {"sparsity": 0.7, **_RAMP, "minimum_density": 0.28}, sparsity=0.7
    ),
    "ST3": Setting(ls.ST3, {"sparsity": 0.7, **_RAMP}, sparsity=0.7),
    "ST3-freeze": Setting(ls.ST3, {"sparsity": 0.7, **_RAMP, "freeze": 0.6}, sparsity=0.7),
    "ST3-block": Setting(
        ls.ST3,
        {"sparsity": 0.7, **_RAMP, "pattern": "block:1x3"},
        sparsity=0.7,
        unheard={"distribution": "uniform"},  # else norms of small layers, which hardly scatter, all survive
    ),
    "ST3-n:m": Setting(ls.ST3, {**_RAMP, "pattern": "1:3"}, {"pattern": "1:1"}, sparsity=2 / 3),
    "ST3Sigma": Setting(ls.ST3Sigma, {"sparsity": 0.7, **_RAMP}, sparsity=0.7),
    "STR": Setting(ls.STR, _THRESHOLD, _NO_THRESHOLD),
    "AutoSparse": Setting(ls.AutoSparse, {**_THRESHOLD, "alpha": 0.5, "alpha_reset": 0.7}, _NO_THRESHOLD),
    "AutoSparse-budget": Setting(
        ls.AutoSparse, {"sparsity": 0.7, **_RAMP, **_THRESHOLD, "alpha_reset": 0.7}, sparsity=0.7
    ),
    "TopKGradientAnnealing": Setting(
        ls.TopKGradientAnnealing, {"sparsity": 0.7, **_RAMP, "alpha_reset": 0.7, "backward_sparsity": 0.4}, sparsity=0.7
    ),
    "StaticSparsity": Setting(ls.StaticSparsity, {"sparsity": 0.7}, sparsity=0.7),
    "SET": Setting(ls.SET, {"sparsity": 0.7, "update_every_n_steps": 2}, sparsity=0.7),
    "RigL": Setting(ls.RigL, {"sparsity": 0.7, "update_every_n_steps": 2, "distribution": "uniform"}, sparsity=0.7),
    "SNFS": Setting(ls.SNFS, {"sparsity": 0.7, "update_every_n_steps": 2, "end": 0.5}, sparsity=0.7),
    "DSR": Setting(
        ls.DSR, {"sparsity": 0.7, "update_every_n_steps": 2, "end": 0.75, "drop_threshold": 0.02}, sparsity=0.7
    ),
    "DeepRewiring": Setting(ls.DeepRewiring, {"sparsity": 0.7, "end": 0.75, "l1": 0.1, "noise": 0.3}, sparsity=0.7),
    "GraNet": Setting(ls.GraNet, {"sparsity": 0.7, **_RAMP, "update_every_n_steps": 2}, sparsity=0.7),
    "GraNet-sparse": Setting(
        ls.GraNet, {"sparsity": 0.7, **_RAMP, "update_every_n_steps": 3, "initial_sparsity": 0.5}, sparsity=0.7
    ),
    "MEST": Setting(
        ls.MEST,
        {"sparsity": 0.7, "update_every_n_steps": 2, "mutation": {0.0: 0.1, 0.25: 0.05, 0.5: 0.0}},
        sparsity=0.7,
    ),
    "MEST-soft": Setting(
        ls.MEST,
        {
            "sparsity": 0.7,
            "variant": "EM&S",
            "update_every_n_steps": 2,
            "mutation": {0.0: 0.1, 0.5: 0.0},
            "grad_weight": 0.1,
        },
        sparsity=0.7,
    ),
    "GMP": Setting(ls.GMP, {"sparsity": 0.7, **_RAMP, "update_every_n_steps": 2}, sparsity=0.7),
    "LAMP": Setting(ls.LAMP, {"sparsity": 0.7, **_RAMP, "update_every_n_steps": 2}, sparsity=0.7),
    "IterativeMagnitudePruning": Setting(
        ls.IterativeMagnitudePruning,
        {"sparsity": 0.7, "rounds": 2, "epochs_per_round": 1},
        {"sparsity": 0.0, "rewind": None, "rounds": 2, "epochs_per_round": 1},
        sparsity=0.7,
    ),
    "IterativeMagnitudePruning-learning-rate": Setting(
        ls.IterativeMagnitudePruning,
        {"sparsity": 0.7, "rounds": 2, "epochs_per_round": 1, "rewind": "learning_rate", "distribution": "uniform"},
        {"sparsity": 0.0, "rewind": None, "rounds": 2, "epochs_per_round": 1},
        sparsity=0.7,
    ),
    "StraightThroughMagnitude": Setting(ls.StraightThroughMagnitude, {"sparsity": 0.7, **_RAMP}, sparsity=0.7),
    "Powerpropagation": Setting(
        ls.Powerpropagation,
        {"sparsity": 0.7, **_RAMP, "power": 1.5, "update_every_n_steps": 2},
        {"sparsity": 0.0, "power": 1.0},
        sparsity=0.7,
    ),
    "TopKAST": Setting(
        ls.TopKAST,
        {"sparsity": 0.7, "backward_sparsity": 0.4, "exploration_loss": 0.01, "update_every_n_steps": 2},
        {"sparsity": 0.0, "power": 1.0},
        sparsity=0.7,
    ),
    "TopKAST-power": Setting(
        ls.TopKAST,
        {"sparsity": 0.7, "end": 0.7, "power": 1.5, "distribution": "erk", "update_every_n_steps": 1},
        {"sparsity": 0.0, "power": 1.0},
        sparsity=0.7,
    ),
    "ACDC": Setting(
        ls.ACDC, {"sparsity": 0.7, "start": 0.1, "end": 0.7, "sparse_phase": 0.2, "dense_phase": 0.1}, sparsity=0.7
    ),
    "OptG": Setting(ls.OptG, {"sparsity": 0.7, "end": 0.5, "beta": 2.0}, sparsity=0.7),
    "SSTE": Setting(ls.SSTE, {"pattern": "1:3"}, {"pattern": "1:1"}, sparsity=2 / 3),
    "LATS": Setting(ls.LATS, {"threshold": 0.05}, {"threshold": 0.0}),
    "ProbMask": Setting(
        ls.ProbMask,
        {"sparsity": 0.7, "start": 0.1, "end": 0.5, "freeze": 0.9, "score_lr": 0.05},
        sparsity=0.7,
        unheard={"distribution": "uniform"},  # else the probabilities of the others grow at the cost of theirs
    ),
    "Spartan": Setting(ls.Spartan, {"sparsity": 0.7, "end": 0.5, "finetune": 0.8}, sparsity=0.7),
    "SparseVariationalDropout": Setting(
        ls.SparseVariationalDropout,
        {"kl_weight": 1e-4, **_RAMP, "threshold": 0.5, "log_variance_init": -5.0, "log_variance_lr": 0.02},
        # Variances that round to zero, and no bound that would raise them.
        {"kl_weight": 0.0, "log_variance_init": -600.0, "bound": 700.0},
    ),
    "KeepMask": Setting(Pruned, {"zeros": 0.7}, {"zeros": 0.0}),
}


def parametrize(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("setting", [SETTINGS[name] for name in names], ids=names)


every_strategy = parametrize(*SETTINGS)
# For what does not depend on the method: latents with a soft threshold, with a mask, with a learned threshold, and no
# latents at all.
some_strategies = parametrize("ST3", "TopKGradientAnnealing", "AutoSparse", "GMP")
