"""Published methods, one file per paper."""

from lightning_sparse.strategies.autosparse import AutoSparse
from lightning_sparse.strategies.gmp import GMP
from lightning_sparse.strategies.rigl import RigL
from lightning_sparse.strategies.set import SET
from lightning_sparse.strategies.sparse_to_sparse import StaticSparsity
from lightning_sparse.strategies.st3 import ST3, ST3Sigma
from lightning_sparse.strategies.str import STR
from lightning_sparse.strategies.topk_annealing import TopKGradientAnnealing

__all__ = ["AutoSparse", "GMP", "RigL", "SET", "ST3", "ST3Sigma", "STR", "StaticSparsity", "TopKGradientAnnealing"]
