"""Models that train in milliseconds, their data, and a Trainer that writes and prints nothing."""

import copy
import functools
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from torch import Tensor, nn

BATCHES, BATCH_SIZE, CLASSES = 4, 6, 3


def make_batches(seed: int = 0, batches: int = BATCHES) -> list[tuple[Tensor, Tensor]]:
    """Random 6×6 images with random labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batches, BATCH_SIZE, 1, 6, 6, generator=generator)
    return list(zip(images, torch.randint(CLASSES, (batches, BATCH_SIZE), generator=generator), strict=True))


def make_dataset() -> torch.utils.data.TensorDataset:
    images, labels = zip(*make_batches(), strict=True)
    return torch.utils.data.TensorDataset(torch.cat(images), torch.cat(labels))


class Loader:
    """The same batches in the same order, without drawing from the global generator as a ``DataLoader`` does."""

    def __init__(self, seed: int = 0, batches: int = BATCHES) -> None:
        self.batches = make_batches(seed, batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class Stream(torch.utils.data.IterableDataset[Any]):
    """The same batches, of unknown number."""

    def __iter__(self) -> Iterator[Any]:
        return iter(make_batches())


class ResumableLoader(Loader):
    """Batches in an order that changes every epoch; a checkpoint holds the place in it."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sampler, self.epoch, self.place = self, 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning, on what it finds as ``sampler``."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(self.epoch)).tolist()
        self.place %= len(self)
        while self.place < len(self):
            self.place += 1
            yield self.batches[order[self.place - 1]]

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


def make_net(*, norm: bool = True, dropout: float = 0.2) -> nn.Sequential:
    """Convolution, transposed convolution and linear layers; with dropout, so that random draws matter."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4) if norm else nn.Identity(),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 3, 2),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(75, 8),
        nn.ReLU(),
        nn.Linear(8, CLASSES),
    )


OPTIMIZERS = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adamw": functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "adamw-foreach": functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1, foreach=True),
    "adam-fused": functools.partial(torch.optim.Adam, lr=0.01, fused=True),
    "rmsprop": functools.partial(torch.optim.RMSprop, lr=0.003, momentum=0.5),
    "adagrad": functools.partial(torch.optim.Adagrad, lr=0.05),
}


class Repeatable(L.LightningModule):
    """Checkpoints also hold the state of the random generator."""

    _random: Tensor | None = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["random"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._random = checkpoint.get("random")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self._random is not None:
            torch.set_rng_state(self._random)
            self._random = None


class Classifier(Repeatable):
    """A small network that tells classes of images apart."""

    def __init__(self, net: nn.Module | None = None, optimizer: str = "sgd", schedule: bool = True) -> None:
        super().__init__()
        self.net = make_net() if net is None else net
        self.make_optimizer, self.schedule = OPTIMIZERS[optimizer], schedule
        self.lr = self.make_optimizer.keywords["lr"]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def compute_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.compute_loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.compute_loss(batch), batch_size=BATCH_SIZE)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters(), lr=self.lr)
        if not self.schedule:
            return optimizer
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.8), "interval": "step"}]


class ManualClassifier(Classifier):
    """The same, stepping its optimizer itself, once every second batch."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.compute_loss(batch))
        if batch_idx % 2:
            optimizer = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()


class Gan(Repeatable):
    """Two optimizers. The generator steps half as often; ``together`` computes both losses before any step."""

    def __init__(self, together: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization, self.together = False, together
        self.generator = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 36))
        self.critic = nn.Sequential(nn.Linear(36, 12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        images = batch[0].flatten(1)
        generator, critic = self.optimizers()
        fake = self.generator(torch.randn(len(images), 4))
        if self.together:
            generator_loss = -self.critic(fake).mean()
            critic_loss = self.critic(fake.detach()).mean() - self.critic(images).mean()
            self.step(critic, critic_loss, retain_graph=True, inputs=list(self.critic.parameters()), hold=True)
            self.step(generator, generator_loss, inputs=list(self.generator.parameters()), hold=True)
            critic.step()
            generator.step()
            return
        self.step(critic, self.critic(fake.detach()).mean() - self.critic(images).mean())
        if batch_idx % 2:
            self.step(generator, -self.critic(fake).mean())

    def step(self, optimizer: Any, loss: Tensor, hold: bool = False, **kwargs: Any) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss, **kwargs)
        if not hold:
            optimizer.step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.critic(batch[0].flatten(1)).mean(), batch_size=BATCH_SIZE)

    def configure_optimizers(self) -> Any:
        return (
            torch.optim.Adam(self.generator.parameters(), lr=0.01),
            torch.optim.SGD(self.critic.parameters(), lr=0.05, momentum=0.9),
        )


class Saver(Checkpoint):
    """Saves after every batch with an optimizer step, and after every epoch."""

    def __init__(self) -> None:
        self.step = 0

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step > self.step:
            self.step = trainer.global_step
            trainer.save_checkpoint(f"step={self.step}.ckpt")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(f"epoch={trainer.current_epoch}.ckpt")


def make_trainer(*callbacks: Callback, **flags: Any) -> L.Trainer:
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 3,
    }
    return L.Trainer(callbacks=list(callbacks), **quiet | flags)


def run(
    trainer: L.Trainer, model: L.LightningModule, ckpt_path: str | None = None, loader: Loader | None = None
) -> None:
    """Train from the same seed on the same batches."""
    torch.manual_seed(1)
    trainer.fit(model, loader or ResumableLoader(), Loader(seed=1, batches=1), ckpt_path=ckpt_path)


def fit(model: L.LightningModule, *callbacks: Callback, ckpt_path: str | None = None, **flags: Any) -> L.Trainer:
    """The same with a new Trainer."""
    trainer = make_trainer(*callbacks, **flags)
    run(trainer, model, ckpt_path)
    return trainer


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def outcome(trainer: L.Trainer, model: nn.Module, *callbacks: Any) -> dict[str, Any]:
    """All that must be the same at the end of two runs that are to be the same."""
    return {
        "model": snapshot(model),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "callbacks": [callback.state_dict() for callback in callbacks],
        "metrics": [callback.metrics() for callback in callbacks],
        "reports": [callback.report().to_dict() for callback in callbacks],
        "logged": {key: value for key, value in trainer.callback_metrics.items() if key != "sparsity"},
        "random": torch.get_rng_state(),
    }
