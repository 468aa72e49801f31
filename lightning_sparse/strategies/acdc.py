"""AC/DC: phases of compressed and of decompressed training take turns."""

from collections.abc import Sequence
from typing import Literal, Unpack

from torch import Tensor

from lightning_sparse.cards import Card
from lightning_sparse.engine.callback import Patterned, SparseTraining
from lightning_sparse.engine.checks import check_moment
from lightning_sparse.engine.latent import Context, Latent

__all__ = ["ACDC"]


class ACDC(SparseTraining):
    r"""Train dense, then sparse and dense by turns, then sparse to the end.

    .. math:: w = m \odot \theta, \qquad \frac{\partial L}{\partial \theta} = m \odot \frac{\partial L}{\partial w}

    As a sparse phase begins, the mask :math:`m` keeps the largest magnitudes; it stays as it is until the phase ends.
    Pruned weights are set to zero, from where they train on in the next dense phase. From ``end`` on the network stays
    sparse. A sparse phase that a full dense one could not follow before ``end`` is left out, so that the last dense
    phase is longer than the others.

    Args:
        sparsity: Fraction of zeros among the targeted weights in sparse phases, in ``[0, 1)``; reached exactly.
        start: When the first sparse phase begins: int = epoch, float = fraction of training.
        end: When the last sparse phase begins.
        sparse_phase: Length of the other sparse phases: int = epochs, float = fraction of training.
        dense_phase: Length of the dense phases.
        distribution: Whether all weights compete (``"global"``) or each has the same sparsity (``"uniform"``).
        reset_optimizer_state: Whether the optimizer forgets what it knows of the targeted weights as a sparse phase
            ends.
        **common: What strategies with masks take, see :class:`~lightning_sparse.engine.callback.Patterned`.

    Raises:
        ValueError: If a value is out of its range, or a pattern matches nothing.

    Note:
        In 100 epochs the defaults are the phases of the authors' configuration for ResNet-50 on ImageNet: sparse in
        epochs 10 to 15, 20 to 25 and so on to 75, then from 85 on. Their code resets the momentum of all parameters,
        biases included, if asked.

    References:
        Peste et al., "AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural Networks", NeurIPS 2021,
        https://arxiv.org/abs/2106.12379; code https://github.com/IST-DASLab/ACDC.

    Example:
        >>> ACDC(sparsity=0.9, start=10, sparse_phase=5, dense_phase=5, end=85).final_sparsity
        0.9
    """

    card = Card(
        paper="Peste et al., NeurIPS 2021, https://arxiv.org/abs/2106.12379",
        criterion="the largest, in phases; in between all",
        gradient="gradient of the kept weights, of all weights in dense phases",
        schedule="alternates, ends sparse, to the weight",
        dense_gradient="in dense phases",
        training_flops="3 f_S, in dense phases 3 f_D",
        published="ResNet-50 on ImageNet, top-1: 76.45 at 80 %, 75.03 at 90 %, 73.14 at 95 %, 68.48 at 98 %;"
        " MobileNetV1: 70.41 at 75 %, 66.24 at 90 % (authors' README)",
    )
    keeps_latent = False

    def __init__(
        self,
        sparsity: float = 0.9,
        *,
        start: int | float = 0.1,
        end: int | float = 0.85,
        sparse_phase: int | float = 0.05,
        dense_phase: int | float = 0.05,
        distribution: Literal["global", "uniform"] = "global",
        reset_optimizer_state: bool = True,
        **common: Unpack[Patterned],
    ) -> None:
        for name, phase in (("sparse_phase", sparse_phase), ("dense_phase", dense_phase)):
            check_moment(name, phase)
            if not phase:
                raise ValueError(f"Expected argument `{name}` to be longer than nothing, but got {phase!r}.")
        super().__init__(
            sparsity,
            start=start,
            end=end,
            schedule="constant",
            distribution=distribution,
            gradient="masked",
            **common,
        )
        self.sparse_phase, self.dense_phase = sparse_phase, dense_phase
        self.reset_optimizer_state = reset_optimizer_state

    def is_sparse(self, position: float) -> bool:
        """Whether the phase at a position, in epochs, is a sparse one."""
        start, end, sparse, dense = (
            self._clock.at(getattr(self, name), name) for name in ("start", "end", "sparse_phase", "dense_phase")
        )
        position += 1e-9  # so that 0.55 * 100 epochs end with the 55th epoch
        cycle, within = divmod(position - start, sparse + dense)
        last = start + (cycle + 1) * (sparse + dense) > end + 1e-9
        return position >= end or (position >= start and within < sparse and not last)

    def is_due(self, context: Context) -> bool:
        """Whether a phase has ended."""
        sparse = self.is_sparse(context.position)
        pruned = (latent for latent in self._weights.latents.values() if latent.sparsity != 0.0)
        return any(("mask" in latent.state) != sparse for latent in pruned)

    def choose(self, latents: Sequence[Latent], sparsity: float | None, context: Context) -> list[dict[str, Tensor]]:
        """Take the mask of a sparse phase, or none."""
        ended = not sparsity and self.reset_optimizer_state
        for slot in (slot for latent in latents if ended and "mask" in latent.state for slot in latent.slots.values()):
            if isinstance(slot, Tensor) and slot.ndim:
                slot.zero_()
        return super().choose(latents, sparsity, context)

    def way(self, context: Context) -> float:
        """All of it in a sparse phase, nothing in a dense one."""
        return float(self.is_sparse(context.position))

    def gradient_density(self, density: float, context: Context) -> float:
        """That of the weights in sparse phases, all of it in dense ones."""
        begun = context.position - 1.0 / self._clock.batches  # when the batch that has just ended began
        return density if self.is_sparse(begun) else 1.0
