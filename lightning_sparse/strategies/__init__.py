"""Published methods, one file per paper."""

from lightning_sparse.strategies.acdc import ACDC
from lightning_sparse.strategies.autosparse import AutoSparse
from lightning_sparse.strategies.deep_rewiring import DeepRewiring
from lightning_sparse.strategies.dsr import DSR
from lightning_sparse.strategies.gmp import GMP
from lightning_sparse.strategies.granet import GraNet
from lightning_sparse.strategies.imp import IterativeMagnitudePruning
from lightning_sparse.strategies.keep_mask import KeepMask
from lightning_sparse.strategies.lamp import LAMP
from lightning_sparse.strategies.lats import LATS
from lightning_sparse.strategies.mest import MEST
from lightning_sparse.strategies.optg import OptG
from lightning_sparse.strategies.powerprop import Powerpropagation
from lightning_sparse.strategies.probmask import ProbMask
from lightning_sparse.strategies.rigl import RigL
from lightning_sparse.strategies.set import SET
from lightning_sparse.strategies.snfs import SNFS
from lightning_sparse.strategies.spartan import Spartan
from lightning_sparse.strategies.sste import SSTE
from lightning_sparse.strategies.st3 import ST3, ST3Sigma
from lightning_sparse.strategies.static import StaticSparsity
from lightning_sparse.strategies.str import STR
from lightning_sparse.strategies.straight_through import StraightThroughMagnitude
from lightning_sparse.strategies.topk_annealing import TopKGradientAnnealing
from lightning_sparse.strategies.topkast import TopKAST
from lightning_sparse.strategies.variational_dropout import SparseVariationalDropout

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
    "SET",
    "SNFS",
    "SSTE",
    "ST3",
    "ST3Sigma",
    "STR",
    "Spartan",
    "SparseVariationalDropout",
    "StaticSparsity",
    "StraightThroughMagnitude",
    "TopKAST",
    "TopKGradientAnnealing",
]
