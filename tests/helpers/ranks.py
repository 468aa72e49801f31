"""Training in a group of processes: replicated (DDP), sharded (FSDP2), sharded and split over tensor-parallel ranks."""

import os
import socket
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_sparse import RunRecorder, SparseTraining
from lightning_sparse.functional.sharding import whole
from tests.helpers.assertions import assert_sparse
from tests.helpers.models import Classifier, Loader, make_trainer
from tests.helpers.strategies import SETTINGS

# How the weights lie on the ranks; "sharded" also writes checkpoints in shards.
LAYOUTS = ("ddp", "fsdp", "fsdp-sharded", "fsdp-tp")


def make_narrow_net() -> nn.Sequential:
    """Rows that do not divide evenly, and fewer rows than ranks, so that some ranks hold nothing of a weight."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.SiLU(),
        nn.ConvTranspose2d(3, 3, 2),
        nn.Flatten(),
        nn.Linear(75, 10),
        nn.SiLU(),
        nn.Linear(10, 1),
        nn.Linear(1, 3),
    )


class SpreadClassifier(Classifier):
    """Lies on the ranks as its Trainer's strategy has it."""

    def __init__(self) -> None:
        super().__init__(make_narrow_net())

    def configure_model(self) -> None:
        if not isinstance(self.trainer.strategy, ModelParallelStrategy):
            return
        if self.device_mesh["tensor_parallel"].size() > 1:
            plan = {"4": ColwiseParallel(), "6": RowwiseParallel()}
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)
        for module in (self.net[0], self.net[4], self):  # the root takes the rest
            fully_shard(module, mesh=self.device_mesh["data_parallel"])


class Agreement(Callback):
    """Checks after every batch that the model is sparse and that all ranks hold the same, bit for bit."""

    def __init__(self, sparse: SparseTraining) -> None:
        self.sparse, self.compared = sparse, 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        assert_sparse(pl_module, self.sparse)
        for tensors in held(pl_module, self.sparse).values():
            for tensor in tensors.values():
                for other in trainer.strategy.all_gather(tensor).view(trainer.world_size, *tensor.shape):
                    assert torch.equal(other, tensor)
                    self.compared += 1


class SaveAtEpoch(Checkpoint):
    """Saves at the end of the second epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(self.path)


def held(model: nn.Module, sparse: SparseTraining) -> dict[str, dict[str, torch.Tensor]]:
    """What a rank holds, put together where it is sharded."""
    names = sparse.targets
    return {
        "weights": {name: whole(parameter.detach()).clone() for name, parameter in model.named_parameters()},
        "latents": {name: whole(sparse.latent(name)).clone() for name in names},
        "masks": {name: whole(sparse.mask(name)).clone() for name in names},
        "thresholds": {name: torch.tensor(sparse.threshold(name) or 0.0) for name in names},
    }


def train(
    name: str,
    layout: str,
    save: Path | None = None,
    resume: Path | None = None,
    record: Path | None = None,
    model: Classifier | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Train on the same global batches, which the ranks of a data-parallel group share out."""
    callback, batches = SETTINGS[name].build(**kwargs), Loader(batches=8)
    flags: dict[str, Any] = {}
    if layout != "one":
        size = (
            torch.distributed.get_world_size() if torch.distributed.is_initialized() else int(os.environ["WORLD_SIZE"])
        )
        split = 2 if layout == "fsdp-tp" else 1
        sharded = ModelParallelStrategy(size // split, split, save_distributed_checkpoint=layout == "fsdp-sharded")
        flags = {"devices": size, "strategy": "ddp" if layout == "ddp" else sharded}
        rank, replicas = int(os.environ["RANK"]) // split, size // split
    else:
        rank, replicas = 0, 1
    images, labels = zip(*batches.batches, strict=True)
    batches.batches = [
        (torch.cat(images[i : i + 4]).chunk(replicas)[rank], torch.cat(labels[i : i + 4]).chunk(replicas)[rank])
        for i in (0, 4)
    ]
    agreement, model = Agreement(callback), model or SpreadClassifier()
    others: list[Callback] = [] if save is None else [SaveAtEpoch(save)]
    others += [] if record is None else [RunRecorder(record)]
    make_trainer(agreement, callback, *others, **flags).fit(model, batches, Loader(), ckpt_path=resume)
    return {**held(model, callback), "metrics": callback.metrics(), "compared": agreement.compared}


def find_port() -> int:
    """A port that nobody uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def process_group(rank: int, port: int, size: int = 2) -> dict[str, str]:
    """Environment of one of the processes that train together."""
    return {
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"},
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"},
        **{"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)},
    }


def spawn(job: Any, size: int, *args: Any) -> None:
    """Run ``job(*args)`` in a group of processes."""
    torch.multiprocessing.spawn(_join, (find_port(), size, job, args), nprocs=size)


def _join(rank: int, port: int, size: int, job: Any, args: Iterable[Any]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ |= process_group(rank, port, size)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    job(*args)
    torch.distributed.destroy_process_group()


def keep(result: Any, path: Path) -> None:
    """Write the result of the first rank, and wait for it."""
    if torch.distributed.get_rank() == 0:
        torch.save(result, path)
    torch.distributed.barrier()
