"""IMP: train, prune, rewind, and again."""

from dataclasses import dataclass
from typing import Literal, Unpack

import torch
from torch import Tensor

from lightning_sparse import functional
from lightning_sparse.cards import Card
from lightning_sparse.engine.callback import Patterned, SparseTraining
from lightning_sparse.engine.checks import check_choice, check_positive
from lightning_sparse.engine.latent import Context, Latent
from lightning_sparse.engine.rewind import Rounds

__all__ = ["IterativeMagnitudePruning"]


class IterativeMagnitudePruning(SparseTraining):
    r"""Train the network, prune its smallest weights, rewind and train the rest, round after round in one ``fit``.

    .. math:: w = m \odot \theta, \qquad \frac{\partial L}{\partial \theta} = m \odot \frac{\partial L}{\partial w}

    The first round trains the dense network for :math:`E` epochs. Before each of the other :math:`R - 1` rounds the
    smallest of the weights that are left go, the same fraction each time, so that the last round trains at
    ``sparsity``. Then training goes back to epoch :math:`k` of the first round and on to its end:

    - ``rewind="weights"``: all parameters and buffers, learning rates and schedulers are again as they were at epoch
      :math:`k`; optimizers start anew.
    - ``rewind="learning_rate"``: learning rates and schedulers only.
    - ``rewind=None``: nothing. What is left is fine-tuned as the schedulers have it.

    All that takes :math:`E + (R - 1) (E - k)` epochs; give the Trainer as many as ``max_epochs``, and schedulers the
    :math:`E` of one round. If there are more, the last round is longer.

    Args:
        sparsity: Fraction of zeros among the targeted weights in the last round, in ``[0, 1)``; reached exactly.
        rounds: Number of trainings :math:`R`, the dense one included, at least 2. 11 rounds to a sparsity of 0.9 prune
            a fifth of the weights each time, as the authors do.
        epochs_per_round: Length :math:`E` of the first round; by default such that all fit into the training.
        rewind: What goes back.
        rewind_epoch: Where to, :math:`k`, in ``[0, E)``. Large networks need a few epochs before.
        distribution: ``"global"``, all weights compete, or ``"uniform"``, the same sparsity in each layer.
        **common: What strategies with masks take, see :class:`~lightning_sparse.engine.callback.Patterned`.

    Raises:
        ValueError: If a value is out of its range, or a pattern matches nothing.
        MisconfigurationException: If a schedule cannot be repeated, or the training is too short for its rounds.

    Note:
        The network is pruned and rewound when the first epoch of a round begins, so that validation and checkpoints at
        the end of a round show what it has learned. What goes back is kept in the memory of the CPU. The order of the
        data goes on and does not repeat. As in the authors' code, optimizers are new after rewinding weights, and
        schedulers as after the first :math:`k` epochs; that code prunes one weight more than the fraction, as it drops
        weights equal to the threshold, and leaves stale values under the mask after the last step.

    References:
        Frankle and Carbin, "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks", ICLR 2019,
        https://arxiv.org/abs/1803.03635; code https://github.com/facebookresearch/open_lth. Renda, Frankle and Carbin,
        "Comparing Rewinding and Fine-tuning in Neural Network Pruning", ICLR 2020, https://arxiv.org/abs/2003.02389.

    Example:
        >>> IterativeMagnitudePruning(sparsity=0.8, rounds=5, rewind="learning_rate").final_sparsity
        0.8
    """

    card = Card(
        paper="Frankle and Carbin, ICLR 2019, https://arxiv.org/abs/1803.03635",
        criterion="the largest of those that are left, round by round",
        gradient="gradient of the kept weights; between rounds weights or learning rates go back",
        schedule="the same fraction of what is left in each round, to the weight",
    )
    keeps_latent = False
    signed = True

    def __init__(
        self,
        sparsity: float = 0.9,
        *,
        rounds: int = 11,
        epochs_per_round: int | None = None,
        rewind: Literal["learning_rate", "weights"] | None = "weights",
        rewind_epoch: int = 0,
        distribution: Literal["global", "uniform"] = "global",
        **common: Unpack[Patterned],
    ) -> None:
        super().__init__(sparsity, start=0, end=0, distribution=distribution, gradient="masked", **common)
        check_positive("rounds", rounds)
        if rounds < 2:
            raise ValueError(f"Expected argument `rounds` to be at least 2, the dense one included, but got {rounds}.")
        if epochs_per_round is not None:
            check_positive("epochs_per_round", epochs_per_round)
        if rewind is not None:
            check_choice("rewind", rewind, ("learning_rate", "weights"))
        last = None if epochs_per_round is None else epochs_per_round - 1
        if isinstance(rewind_epoch, bool) or not isinstance(rewind_epoch, int):
            raise TypeError(f"Expected argument `rewind_epoch` to be an int, but got {rewind_epoch!r}.")
        if rewind_epoch < 0 or (last is not None and rewind_epoch > last):
            raise ValueError(
                "Expected argument `rewind_epoch` to lie in [0, `epochs_per_round`), but got"
                f" {rewind_epoch!r} with `epochs_per_round` = {epochs_per_round!r}."
            )
        self.rounds: Rounds = Rounds(rounds, epochs_per_round, rewind, rewind_epoch)
        self.schedule = _SameFraction(self.final_sparsity or sparsity)

    def is_due(self, context: Context) -> bool:
        """Never in a round."""
        return False

    def way(self, context: Context) -> float:
        """How much of the way this round has gone."""
        return self.schedule(context.rounds / (self.rounds.number - 1))

    def score(self, latent: Latent) -> Tensor:
        """Magnitudes of the weights that are left, less than any of them for the others."""
        if self.pattern is not None:  # whose groups compete by what is left of them
            return functional.hard_threshold(latent.theta, latent.mask)
        return torch.where(latent.mask, latent.theta.abs(), -1.0)

    @property
    def target_reached(self) -> bool:
        """Whether the last round has begun, and the model has its final sparsity."""
        last = self._rewinder.done == self.rounds.number - 1
        return (last or not self.final_sparsity) and super().target_reached


@dataclass(frozen=True)
class _SameFraction:
    """Fraction of the way to the sparsity, where each step prunes the same fraction of what is left."""

    sparsity: float

    def __call__(self, progress: float) -> float:
        return (1.0 - (1.0 - self.sparsity) ** progress) / self.sparsity if self.sparsity else progress
