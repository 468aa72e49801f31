"""Sparse training for PyTorch Lightning: one callback, any model."""

from importlib.metadata import version

from lightning_sparse.engine.callback import SparseTraining
from lightning_sparse.engine.checkpoint import SparseModelCheckpoint, consolidate_checkpoint
from lightning_sparse.engine.recorder import RunRecorder
from lightning_sparse.engine.tables import read_budgets
from lightning_sparse.strategies import (
    ACDC,
    DSR,
    GMP,
    LAMP,
    LATS,
    MEST,
    SET,
    SNFS,
    SSTE,
    ST3,
    STR,
    AutoSparse,
    DeepRewiring,
    GraNet,
    IterativeMagnitudePruning,
    KeepMask,
    OptG,
    Powerpropagation,
    ProbMask,
    RigL,
    SparseVariationalDropout,
    Spartan,
    ST3Sigma,
    StaticSparsity,
    StraightThroughMagnitude,
    TopKAST,
    TopKGradientAnnealing,
)

__all__ = [
    "ACDC",
    "AutoSparse",
    "DSR",
    "DeepRewiring",
    "GMP",
    "GraNet",
    "IterativeMagnitudePruning",
    "KeepMask",
    "LAMP",
    "LATS",
    "MEST",
    "OptG",
    "Powerpropagation",
    "ProbMask",
    "RigL",
    "RunRecorder",
    "SET",
    "SNFS",
    "SSTE",
    "ST3",
    "ST3Sigma",
    "STR",
    "SparseModelCheckpoint",
    "SparseTraining",
    "SparseVariationalDropout",
    "Spartan",
    "StaticSparsity",
    "StraightThroughMagnitude",
    "TopKAST",
    "TopKGradientAnnealing",
    "consolidate_checkpoint",
    "read_budgets",
]
__version__ = version("lightning-sparse")
