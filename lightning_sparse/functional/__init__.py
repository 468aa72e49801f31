"""Pure maths of sparse training: tensors and numbers in, tensors out."""

from lightning_sparse.functional.gradients import anneal_gradient, backward_set, mask_gradient
from lightning_sparse.functional.measures import count_nonzeros, count_zeros, sparsity
from lightning_sparse.functional.projections import channel_scale, hard_threshold, soft_threshold
from lightning_sparse.functional.selection import kth_largest, magnitude_quantile, order_statistics, topk_masks

__all__ = [
    "anneal_gradient",
    "backward_set",
    "channel_scale",
    "count_nonzeros",
    "count_zeros",
    "hard_threshold",
    "kth_largest",
    "magnitude_quantile",
    "mask_gradient",
    "order_statistics",
    "soft_threshold",
    "sparsity",
    "topk_masks",
]
