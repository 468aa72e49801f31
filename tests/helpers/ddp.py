"""A group of two processes that train every strategy, one after the other."""

import os
import socket
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from lightning_sparse import SparseTraining
from tests.helpers.assertions import assert_sparse
from tests.helpers.models import Classifier, Loader, make_net, make_trainer
from tests.helpers.strategies import SETTINGS


class Agreement(Callback):
    """Compares what the ranks hold after every batch, bit for bit, and keeps what they hold at the end."""

    def __init__(self, sparse: SparseTraining) -> None:
        self.sparse, self.compared = sparse, 0

    def held(self, model: Any) -> dict[str, dict[str, torch.Tensor]]:
        names = self.sparse.targets
        return {
            "weights": {name: parameter.detach().clone() for name, parameter in model.named_parameters()},
            "latents": {name: self.sparse.latent(name).clone() for name in names},
            "masks": {name: self.sparse.mask(name).clone() for name in names},
            "thresholds": {name: torch.tensor(self.sparse.threshold(name) or 0.0) for name in names},
        }

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        assert_sparse(pl_module, self.sparse)
        for tensors in self.held(pl_module).values():
            for tensor in tensors.values():
                for other in trainer.strategy.all_gather(tensor).view(trainer.world_size, *tensor.shape):
                    assert torch.equal(other, tensor)
                    self.compared += 1

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.end = self.held(pl_module)


def train(name: str, rank: int | None = None) -> dict[str, Any]:
    """Train on two batches a step: as one of two ranks on one of them, else on both in one."""
    callback, batches = SETTINGS[name].build(), Loader()
    agreement = Agreement(callback)
    if rank is None:
        pairs = zip(batches.batches[::2], batches.batches[1::2], strict=True)
        batches.batches = [(torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])) for a, b in pairs]
    else:
        batches.batches = batches.batches[rank::2]
    flags = {} if rank is None else {"strategy": "ddp", "devices": 2}
    model = Classifier(make_net(norm=False, dropout=0.0), schedule=False)
    make_trainer(agreement, callback, **flags).fit(model, batches, Loader())
    return {**agreement.end, "metrics": callback.metrics(), "compared": agreement.compared}


def find_port() -> int:
    """A port that nobody uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def process_group(rank: int, port: int) -> dict[str, str]:
    """Environment of one of two processes that train together."""
    return {
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"},
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"},
        **{"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
    }


def run_rank(rank: int, port: int, folder: str) -> None:
    """Called in each process; writes one file per strategy."""
    torch.set_num_threads(1)
    os.environ |= process_group(rank, port)
    for name in SETTINGS:
        result = train(name, rank)
        if rank == 0:
            torch.save(result, Path(folder, f"{name}.pt"))
    torch.distributed.destroy_process_group()
