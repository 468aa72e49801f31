"""FLOPs of a sparse module as a metric."""

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_sparse.flops import count_flops

__all__ = ["SparseFLOPs"]


class SparseFLOPs(Metric):
    """Theoretical FLOPs of the forward passes it is updated with, zeros of the weights skipped.

    One multiply-accumulate is one FLOP; see :func:`lightning_sparse.flops.count_flops` for what is counted.

    Args:
        ratio: Return the fraction of the dense FLOPs instead of their number.
        **kwargs: Arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> net = nn.Linear(4, 2)
        >>> net.weight.data[0] = 0.0
        >>> metric = SparseFLOPs()
        >>> metric.update(net, torch.randn(1, 4))
        >>> metric.compute()
        tensor(4)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0

    sparse: Tensor
    dense: Tensor

    def __init__(self, ratio: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ratio = ratio
        # Integers, because float32 cannot hold billions exactly and some devices have no float64.
        self.add_state("sparse", default=torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("dense", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, module: nn.Module, *inputs: Any, **kwargs: Any) -> None:
        """Count one forward pass and add it to the total.

        Args:
            module: The module to call.
            *inputs: Arguments of the call.
            **kwargs: Keyword arguments of the call.
        """
        count = count_flops(module, *inputs, **kwargs)
        self.sparse += round(count.sparse)
        self.dense += count.dense

    def compute(self) -> Tensor:
        """Return the sum over the updates, or its ratio to the dense sum (NaN if nothing was counted)."""
        return self.sparse / self.dense if self.ratio else self.sparse
