"""Published methods, one file per paper."""

from lightning_sparse.strategies.autosparse import AutoSparse
from lightning_sparse.strategies.gmp import GMP
from lightning_sparse.strategies.st3 import ST3, ST3Sigma
from lightning_sparse.strategies.str import STR
from lightning_sparse.strategies.topk_annealing import TopKGradientAnnealing

__all__ = ["GMP", "ST3", "ST3Sigma", "STR", "AutoSparse", "TopKGradientAnnealing"]
