"""Sparse training for PyTorch Lightning: one callback, any model."""

from importlib.metadata import version

from lightning_sparse.engine.callback import SparseTraining
from lightning_sparse.engine.checkpoint import SparseModelCheckpoint, consolidate_checkpoint
from lightning_sparse.strategies import (
    GMP,
    SET,
    ST3,
    STR,
    AutoSparse,
    RigL,
    ST3Sigma,
    StaticSparsity,
    TopKGradientAnnealing,
)

__all__ = [
    "AutoSparse",
    "GMP",
    "RigL",
    "SET",
    "ST3",
    "ST3Sigma",
    "STR",
    "SparseModelCheckpoint",
    "SparseTraining",
    "StaticSparsity",
    "TopKGradientAnnealing",
    "consolidate_checkpoint",
]
__version__ = version("lightning-sparse")
