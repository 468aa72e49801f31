"""Train a sparse ResNet-20 on CIFAR-10 from the command line, with any strategy.

    export CIFAR10_JPEG=~/data/cifar-10-batches-py     # or --data.path, see `Cifar10`
    python examples/cifar10.py fit --config examples/cifar10.yaml
    python examples/cifar10.py fit --config examples/cifar10.yaml --trainer.callbacks.sparsity=0.95
    python examples/cifar10.py test --config examples/cifar10.yaml --ckpt_path lightning_logs/version_0/checkpoints/...

`examples/cifar10.yaml` is the recipe of the authors of ST-3. Any other strategy takes its place by name:

    python examples/cifar10.py fit --config examples/cifar10.yaml --trainer.callbacks.class_path=GMP
"""

import io
import os
import pickle
import warnings
from pathlib import Path

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LightningCLI
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

import lightning_sparse  # noqa: F401  (makes the strategies known to the command line by their names)

MEAN, STD = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])


class Block(nn.Module):
    """Two convolutions and a shortcut, which is a convolution where the shape changes."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outputs))

    def forward(self, x):
        out = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(out)) + self.shortcut(x))


class ResNet20(nn.Sequential):
    """ResNet-20 for 32 × 32 images: three stages of three blocks with 16, 32 and 64 channels."""

    def __init__(self, classes=10):
        super().__init__(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            *(Block(16, 16, 1) for _ in range(3)),
            *(Block(16 if i == 0 else 32, 32, 2 if i == 0 else 1) for i in range(3)),
            *(Block(32 if i == 0 else 64, 64, 2 if i == 0 else 1) for i in range(3)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, classes, bias=False),
        )
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")


class Classifier(L.LightningModule):
    """ResNet-20 with the optimizer of the recipe: SGD with momentum, weight decay on weights only, step-wise decay.

    Args:
        lr: Learning rate.
        momentum: Momentum.
        weight_decay: L2 penalty on the weights of convolutions and of the linear layer.
        milestones: Epochs at which the learning rate is divided by ten.
    """

    def __init__(
        self,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        milestones: tuple[int, ...] = (80, 120),
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = ResNet20().to(memory_format=torch.channels_last)

    def forward(self, images):
        return self.network(images)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("val_accuracy", (self(images).argmax(1) == labels).float().mean(), prog_bar=True)

    def test_step(self, batch, batch_idx):
        images, labels = batch
        self.log("test_accuracy", (self(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        weights = [p for p in self.parameters() if p.ndim > 1]
        vectors = [p for p in self.parameters() if p.ndim <= 1]
        groups = [{"params": weights, "weight_decay": self.hparams.weight_decay}, {"params": vectors}]
        optimizer = torch.optim.SGD(groups, self.hparams.lr, self.hparams.momentum)
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, self.hparams.milestones)]


class Images(Dataset):
    """Images (uint8, NHWC) and labels in memory, served by the batch."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.labels)

    def __getitems__(self, indices):
        return self.images[indices], self.labels[indices]


class Cifar10(L.LightningDataModule):
    """CIFAR-10: 45,000 images to train, 5,000 to validate, 10,000 to test.

    Args:
        path: The directory of the python release (``cifar-10-batches-py``), or an archive ``.npz`` of JPEG files with
            arrays ``train_jpeg``, ``train_length``, ``train_label`` and the same for ``test``: all files one after
            another, their lengths in bytes, their classes. By default what the environment variable ``CIFAR10_JPEG``
            names.
        batch_size: Images per batch.
    """

    def __init__(self, path: str | None = None, batch_size: int = 128) -> None:
        super().__init__()
        self.path, self.batch_size = path or os.environ.get("CIFAR10_JPEG"), batch_size
        self.splits = {}

    def setup(self, stage: str) -> None:
        if self.splits:
            return
        if not self.path or not Path(self.path).exists():
            raise FileNotFoundError(f"Expected CIFAR-10 in --data.path or CIFAR10_JPEG, but got {self.path!r}.")
        read = read_release if Path(self.path).is_dir() else read_jpegs
        images, labels = read(Path(self.path), "train")
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        cut = len(labels) * 9 // 10
        self.splits = {
            "train": Images(images[order[:cut]], labels[order[:cut]]),
            "val": Images(images[order[cut:]], labels[order[cut:]]),
            "test": Images(*read(Path(self.path), "test")),
        }

    def train_dataloader(self):
        return DataLoader(self.splits["train"], self.batch_size, shuffle=True, drop_last=True, collate_fn=tuple)

    def val_dataloader(self):
        return DataLoader(self.splits["val"], 500, collate_fn=tuple)

    def test_dataloader(self):
        return DataLoader(self.splits["test"], 500, collate_fn=tuple)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        """Augment a training batch, and normalise; on the device and without a loop over images."""
        images, labels = batch
        if self.trainer.training:
            images = shift_and_flip(images)
        images = (images / 255 - MEAN.to(images.device)) / STD.to(images.device)
        return images.permute(0, 3, 1, 2), labels  # NHWC in memory is what PyTorch calls channels_last


def shift_and_flip(images):
    """Shift each image by up to 4 pixels, repeating its edge, and mirror every other one."""
    count, size = images.shape[:2]
    shifts = torch.randint(-4, 5, (2, count, 1), device=images.device)
    rows, columns = (torch.arange(size, device=images.device) + shifts).clamp(0, size - 1)
    columns = torch.where(torch.rand(count, 1, device=images.device) < 0.5, size - 1 - columns, columns)
    return images[torch.arange(count, device=images.device)[:, None, None], rows[:, :, None], columns[:, None, :]]


def read_jpegs(path, split):
    """Images (uint8, NHWC) and labels of an archive of JPEG files."""
    with np.load(path) as archive:
        files, ends = archive[f"{split}_jpeg"], archive[f"{split}_length"].cumsum()
        labels = archive[f"{split}_label"]
    parts = np.split(files, ends[:-1])
    images = np.stack([np.asarray(Image.open(io.BytesIO(part)).convert("RGB")) for part in parts])
    return torch.from_numpy(images), torch.from_numpy(labels).long()


def read_release(path, split):
    """Images (uint8, NHWC) and labels of the python release."""
    files = sorted(path.glob("data_batch_*" if split == "train" else "test_batch"))
    batches = [ArrayUnpickler(io.BytesIO(file.read_bytes()), encoding="bytes").load() for file in files]
    images = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    labels = np.concatenate([batch[b"labels"] for batch in batches])
    return torch.from_numpy(images.copy()), torch.from_numpy(labels).long()


class ArrayUnpickler(pickle.Unpickler):
    """A pickle may run any code; this one builds NumPy arrays and nothing else."""

    def find_class(self, module, name):
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "dtype", "ndarray"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"The file asks for {module}.{name}, which arrays have no need of.")


def main():
    warnings.filterwarnings("ignore", ".*LeafSpec|.*does not have many workers")
    return LightningCLI(Classifier, Cifar10)


if __name__ == "__main__":
    main()
