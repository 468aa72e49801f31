"""Arguments that many strategies take, written down once."""

from typing import TypedDict

__all__ = ["Budgeted", "Common", "Patterned"]


class Common(TypedDict, total=False):
    """What all strategies take; for the defaults see :class:`~lightning_sparse.engine.callback.SparseTraining`.

    Args:
        targets: Patterns of the weights to treat, see :func:`~lightning_sparse.engine.targets.find_targets`.
        ignore: Patterns of weights to leave dense.
        overrides: Per pattern ``{"sparsity": ...}`` (a budget of its own, where the method has a budget) or None (stay
            dense).
        compact_optimizer_state: Whether the optimizer forgets pruned weights once the mask stays as it is, where the
            method has such a moment.
        log_layers: Also log sparsity, threshold, dead outputs and overlap of successive masks of every weight.
        verbose: Print a table of the targets before training and a summary after it.
    """

    targets: list[str] | None
    ignore: list[str] | None
    overrides: dict[str, dict[str, float] | None] | None
    compact_optimizer_state: bool
    log_layers: bool
    verbose: bool


class Budgeted(Common, total=False):
    """What strategies with a budget take besides.

    One of ``flops``, ``parameters`` and ``bytes`` may take the place of ``sparsity``. They limit the whole model,
    weights that are not targeted included.

    Args:
        flops: Fraction of the dense inference FLOPs that may remain, in ``(0, 1]``. The LightningModule needs an
            ``example_input_array``.
        parameters: Number of parameters that may remain.
        bytes: Size of the stored model: a bit for each targeted weight, the kept ones, and all else.
        minimum_density: Fraction of each layer that is kept at least, in ``[0, 1)``; the others make up for it.
        targets: Patterns of the weights to treat, see :func:`~lightning_sparse.engine.targets.find_targets`.
        ignore: Patterns of weights to leave dense.
        overrides: Per pattern ``{"sparsity": ...}`` (a budget of its own) or None (stay dense).
        compact_optimizer_state: Whether the optimizer forgets pruned weights once the mask stays as it is, where the
            method has such a moment.
        log_layers: Also log sparsity, threshold, dead outputs and overlap of successive masks of every weight.
        verbose: Print a table of the targets before training and a summary after it.
    """

    flops: float | None
    parameters: int | None
    bytes: int | None
    minimum_density: float


class Patterned(Budgeted, total=False):
    """What strategies take whose masks may have a pattern; what :class:`Budgeted` holds is repeated.

    Args:
        pattern: Which weights live or die together, see :func:`~lightning_sparse.functional.parse_pattern`:
            ``"unstructured"`` (none), ``"n:m"``, ``"block:AxB"`` or ``"channel"``.
        flops: Fraction of the dense inference FLOPs that may remain, in ``(0, 1]``. The LightningModule needs an
            ``example_input_array``.
        parameters: Number of parameters that may remain.
        bytes: Size of the stored model: a bit for each targeted weight, the kept ones, and all else.
        minimum_density: Fraction of each layer that is kept at least, in ``[0, 1)``; the others make up for it.
        targets: Patterns of the weights to treat, see :func:`~lightning_sparse.engine.targets.find_targets`.
        ignore: Patterns of weights to leave dense.
        overrides: Per pattern ``{"sparsity": ...}`` (a budget of its own) or None (stay dense).
        compact_optimizer_state: Whether the optimizer forgets pruned weights once the mask stays as it is, where the
            method has such a moment.
        log_layers: Also log sparsity, threshold, dead outputs and overlap of successive masks of every weight.
        verbose: Print a table of the targets before training and a summary after it.
    """

    pattern: str
