"""Metrics about the model instead of its predictions: fraction of zeros and FLOPs."""

from lightning_sparse.metrics.flops import SparseFLOPs
from lightning_sparse.metrics.sparsity import Sparsity

__all__ = ["SparseFLOPs", "Sparsity"]
