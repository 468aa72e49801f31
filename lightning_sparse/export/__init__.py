"""From the trained model to what other programs load."""

from lightning_sparse.export.packing import load_sparse, read_sparse, save_sparse

__all__ = ["load_sparse", "read_sparse", "save_sparse"]
