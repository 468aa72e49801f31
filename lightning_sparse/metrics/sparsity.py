"""Fraction of zeros as a metric."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_sparse.engine.targets import find_targets
from lightning_sparse.functional import count_nonzeros

__all__ = ["Sparsity"]


class Sparsity(Metric):
    """Fraction of zeros among the selected weights, counted in the module itself.

    Args:
        targets: Patterns of the weights to count: name globs, ``re:`` regular expressions or module class names. By
            default what a sparse-training callback treats by default. Frozen weights are counted too.
        ignore: Patterns of weights to leave out.
        **kwargs: Arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> net = nn.Linear(4, 2)
        >>> net.weight.data[0] = 0.0
        >>> metric = Sparsity()
        >>> metric.update(net)
        >>> metric.compute()
        tensor(0.5000)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    zeros: Tensor
    total: Tensor

    def __init__(
        self, targets: Sequence[str] | None = None, ignore: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.targets = targets
        self.ignore = ignore
        self.add_state("zeros", default=torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, module: nn.Module, *inputs: Any) -> None:
        """Count the zeros that the module holds now.

        Args:
            module: The module with the weights.
            *inputs: Unused; they let one collection hold this metric and :class:`SparseFLOPs`.
        """
        verdicts = find_targets(module, targets=self.targets, ignore=self.ignore)
        # What cannot be trained can still be counted.
        weights = [verdict.parameter for verdict in verdicts if verdict.treated or verdict.reason == "frozen"]
        total = sum(weight.numel() for weight in weights)
        self.zeros += total - int(count_nonzeros(weights).sum())
        self.total += total

    def compute(self) -> Tensor:
        """Return the fraction of zeros in ``[0, 1]``, or NaN if no weight was selected."""
        return self.zeros / self.total
