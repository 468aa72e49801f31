"""Whether all ranks train the same model."""

import zlib
from collections.abc import Iterable

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_sparse.engine.latent import Latent
from lightning_sparse.functional.sharding import is_sharded

__all__ = ["check_agreement"]


def check_agreement(method: str, trainer: pl.Trainer, latents: Iterable[Latent]) -> None:
    """Compare checksums of masks and thresholds between the ranks, of sharded weights those of the thresholds only.

    Raises:
        RuntimeError: On every rank, if they differ.
    """
    if trainer.world_size == 1:
        return
    latents = list(latents)
    sums = torch.tensor([_checksum(latent) for latent in latents], device=trainer.strategy.root_device)
    everywhere = trainer.strategy.all_gather(sums).view(-1, len(latents))
    differs = (everywhere != everywhere[0]).any(0).tolist()
    if any(differs):
        raise RuntimeError(
            f"The ranks hold different masks or thresholds of `{latents[differs.index(True)].name}` and"
            f" {sum(differs) - 1} other weights of `{method}`: they do not train the same model. Start every rank from"
            " the same weights, and change weights during training on all ranks alike."
        )


def _checksum(latent: Latent) -> int:
    checksum = 0
    for tensor in ({"mask": latent.mask} | latent.state).values():
        if not is_sharded(tensor):
            checksum = zlib.crc32(_bytes(tensor), checksum)
    return checksum


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()
