"""FLOPs of a training, counted by hand."""

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback

from tests.helpers.models import make_trainer

EPOCHS, BATCHES, SAMPLES = 10, 6, 5
SHAPE = (8, 12)


class OneLayer(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(*SHAPE, bias=False)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.layer(batch), torch.ones(len(batch), SHAPE[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Spent(Callback):
    """Adds up, per sample and weight, one for the output, one for the input and as asked for the weight's gradient."""

    def __init__(self, backward):
        self.backward, self.total = backward, 0.0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        density = float((pl_module.layer.weight != 0).float().mean())
        step = trainer.current_epoch * BATCHES + batch_idx
        self.total += (2 * density + self.backward(step, density)) * len(batch) * SHAPE[0] * SHAPE[1]


def assert_spent(callback, backward):
    """What the callback says that training has cost is what it must.

    Args:
        callback: The method.
        backward: From steps so far and density to the fraction of the weight gradient that is computed.
    """
    spent = Spent(backward)
    batches = torch.utils.data.DataLoader([torch.randn(SAMPLES, SHAPE[0]) for _ in range(BATCHES)], batch_size=None)
    make_trainer(callback, spent, max_epochs=EPOCHS).fit(OneLayer(), batches)
    assert abs(callback.metrics()["flops/training_total"] / spent.total - 1) < 1e-6
