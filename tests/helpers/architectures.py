"""Networks of a few hundred weights that tell 6×6 images apart, one for each kind of layer and shape."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from tests.helpers.models import CLASSES


class Chain(nn.Sequential):
    """Layers one after the other; unlike those of PyTorch, their ``forward`` is compiled."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


def make_convolutions() -> nn.Module:
    return Chain(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 1, groups=2),
        nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
        nn.GroupNorm(2, 6),
        nn.SiLU(),
        nn.ConvTranspose2d(6, 2, 2, groups=2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(50, CLASSES),
    )


def make_mlp() -> nn.Module:
    return Chain(
        nn.Flatten(),
        nn.Linear(36, 8),
        nn.LayerNorm(8),
        nn.GELU(),
        nn.Linear(8, 8, bias=False),
        nn.ReLU(),
        nn.Linear(8, CLASSES),
    )


class Attention(nn.Module):
    """A transformer block; with ``separate`` keys and values have an own width and an own projection."""

    def __init__(self, *, separate: bool = False) -> None:
        super().__init__()
        self.width = 4 if separate else 6
        self.attend = nn.MultiheadAttention(6, 2, dropout=0.1, batch_first=True, kdim=self.width, vdim=self.width)
        self.norm = nn.LayerNorm(6)
        self.feed = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
        self.head = nn.Linear(36, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.squeeze(1)
        other = x[..., : self.width]
        x = x + self.attend(x, other, other, need_weights=False)[0]
        return self.head((x + self.feed(self.norm(x))).flatten(1))


class Recurrent(nn.Module):
    """Reads the rows of an image one after the other."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.squeeze(1)
        if isinstance(self.layer, nn.RNNBase):
            return self.head(self.layer(x)[0][:, -1])
        state = None
        for row in x.unbind(1):
            state = self.layer(row, state)
        return self.head(state)


class Tied(nn.Module):
    """The embedding is the head, and one layer is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(5, 6), nn.Linear(6, 6), nn.Linear(6, 5, bias=False)
        self.again, self.head.weight = self.mix, self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x.squeeze(1).sum(-1) > 0).long() + 1
        return self.head(self.again(torch.tanh(self.mix(self.embed(tokens)))).mean(1))


class Odd(nn.Module):
    """Weights in a memory order of their own, frozen, never used, parametrized, and of three to five dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.volume, self.line = nn.Conv3d(1, 2, (1, 2, 2)), nn.Conv1d(10, 3, 2, bias=False)
        self.turned, self.frozen = nn.Linear(12, 5), nn.Linear(5, 5)
        self.turned.weight = nn.Parameter(self.turned.weight.detach().t().clone().t())
        self.frozen.weight.requires_grad_(False)
        self.unused, self.normed = nn.Linear(4, 4), weight_norm(nn.Linear(5, 4))
        self.head = nn.Bilinear(4, 2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.volume(x.unsqueeze(1)).flatten(1, 3)
        x = torch.relu(self.frozen(self.turned(self.line(x).flatten(1))))
        with torch.autocast("cpu", enabled=False):  # which does not know this layer
            x = self.normed(x.to(self.head.weight))
            return self.head(x, x[:, :2])


def make_scalars() -> nn.Module:
    return Chain(
        nn.Conv2d(1, 1, 1),
        nn.Conv2d(1, 1, 1, bias=False),
        nn.Flatten(),
        nn.Linear(36, 1),
        nn.Tanh(),
        nn.Linear(1, 1, bias=False),
        nn.Linear(1, CLASSES),
    )


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "convolutions": make_convolutions,
    "mlp": make_mlp,
    "attention": Attention,
    "attention-separate": lambda: Attention(separate=True),
    "lstm": lambda: Recurrent(nn.LSTM(6, 4, bidirectional=True, proj_size=2, batch_first=True), 4),
    "gru": lambda: Recurrent(nn.GRU(6, 4, num_layers=2, dropout=0.1, batch_first=True), 4),
    "cell": lambda: Recurrent(nn.GRUCell(6, 4, bias=False), 4),
    "tied": Tied,
    "odd": Odd,
    "scalars": make_scalars,
}
