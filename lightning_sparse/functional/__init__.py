"""Pure maths of sparse training: tensors and numbers in, tensors out; sharded tensors (DTensor) included."""

from lightning_sparse.functional.allocation import apportion, erdos_renyi
from lightning_sparse.functional.budgets import affordable
from lightning_sparse.functional.dropout import add_noise, log_alpha, noise_gradient, normal
from lightning_sparse.functional.gradients import (
    anneal_gradient,
    backward_set,
    mask_gradient,
    threshold_gradient,
)
from lightning_sparse.functional.measures import count_nonzeros, sparsity, sum_magnitudes
from lightning_sparse.functional.patterns import (
    Pattern,
    group_exceeds,
    group_scores,
    group_soft_threshold,
    parse_pattern,
    spread_groups,
    vanishing_thresholds,
)
from lightning_sparse.functional.powers import power_gradient, signed_power
from lightning_sparse.functional.probabilities import (
    budget_shift,
    likeliest_masks,
    relaxed_mask,
    relaxed_mask_gradient,
)
from lightning_sparse.functional.projections import (
    channel_scale,
    exceeds,
    hard_threshold,
    rescaled_soft_threshold,
    soft_threshold,
)
from lightning_sparse.functional.scores import lamp_scores
from lightning_sparse.functional.selection import (
    draw,
    kth_largest,
    largest_among,
    magnitude_quantile,
    order_statistics,
    topk_masks,
)
from lightning_sparse.functional.sinkhorn import soft_topk, soft_topk_gradient, soft_topk_pull, soft_topk_shift

__all__ = [
    "Pattern",
    "add_noise",
    "affordable",
    "anneal_gradient",
    "apportion",
    "backward_set",
    "budget_shift",
    "channel_scale",
    "count_nonzeros",
    "draw",
    "erdos_renyi",
    "exceeds",
    "group_exceeds",
    "group_scores",
    "group_soft_threshold",
    "hard_threshold",
    "kth_largest",
    "lamp_scores",
    "largest_among",
    "likeliest_masks",
    "log_alpha",
    "magnitude_quantile",
    "mask_gradient",
    "noise_gradient",
    "normal",
    "order_statistics",
    "parse_pattern",
    "power_gradient",
    "relaxed_mask",
    "relaxed_mask_gradient",
    "rescaled_soft_threshold",
    "signed_power",
    "soft_threshold",
    "soft_topk",
    "soft_topk_gradient",
    "soft_topk_pull",
    "soft_topk_shift",
    "sparsity",
    "spread_groups",
    "sum_magnitudes",
    "threshold_gradient",
    "topk_masks",
    "vanishing_thresholds",
]
