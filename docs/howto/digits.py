"""The model and the data of these pages: handwritten digits, which come with scikit-learn. Nothing here is sparse."""

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Digits(L.LightningModule):
    """Three linear layers, of 64 pixels in and 10 classes out.

    Args:
        width: Units of the hidden layers.
        lr: Learning rate.
    """

    def __init__(self, width: int = 128, lr: float = 0.003) -> None:
        super().__init__()
        self.save_hyperparameters()
        layers = nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        self.layers = nn.Sequential(*layers)
        self.example_input_array = torch.zeros(1, 64)

    def forward(self, images):
        return self.layers(images)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("val_accuracy", (self(images).argmax(1) == labels).float().mean(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.hparams.lr)


class Images(L.LightningDataModule):
    """1,297 images to train and 500 to validate.

    Args:
        batch_size: Images per batch.
    """

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size
        images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
        self.data = TensorDataset(images.float() / 16, labels)

    def train_dataloader(self):
        return DataLoader(torch.utils.data.Subset(self.data, range(1297)), self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(torch.utils.data.Subset(self.data, range(1297, 1797)), 500)
