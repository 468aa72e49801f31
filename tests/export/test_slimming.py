"""Slimmed models are smaller, and the same function: whatever biases, batch norms and padding make of dead channels."""

import copy

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_sparse import GMP
from lightning_sparse.export import channels, slim, slimming
from lightning_sparse.export.unknowns import _HANDS_ON, Unknowns
from tests.helpers.models import make_trainer


class Residual(nn.Module):
    """A stem, a bottleneck beside a shortcut, a head."""

    def __init__(self, width=8, classes=3):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.reduce = nn.Sequential(
            nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.spatial = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.expand = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))
        self.head = nn.Linear(width, classes)

    def forward(self, images):
        x = self.stem(images)
        y = self.expand(self.spatial(self.reduce(x)))
        y += x
        return self.head(F.adaptive_avg_pool2d(F.relu(y), 1).flatten(1))


class Concatenated(nn.Module):
    """As in DenseNet; ``nested`` it is more than torch-pruning follows."""

    def __init__(self, nested=False):
        super().__init__()
        self.nested = nested
        self.a, self.b = nn.Conv2d(1, 6, 3), nn.Conv2d(1, 5, 3)
        self.c = nn.Conv2d(11, 4, 1)
        self.d = nn.Linear((11 + 4) * 4, 7)
        self.e = nn.Linear(7, 2)

    def forward(self, images):
        a, b = torch.tanh(self.a(images)), F.relu(self.b(images))
        both = torch.cat([a, b], 1)
        c = self.c(both)
        x = torch.cat([c, both] if self.nested else [c, a, b], dim=1)
        return self.e(F.silu(self.d(F.max_pool2d(x, 2).flatten(1))))


class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU6(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU6(),
            nn.Conv2d(8, 12, 1, bias=False),
            nn.BatchNorm2d(12),
            nn.PReLU(12),
            nn.Conv2d(12, 6, 1, groups=2),
            nn.Hardswish(),
            nn.AvgPool2d(3),
            nn.Flatten(),
            nn.Linear(6, 3),
        )

    def forward(self, images):
        return self.layers(images)


class Block(nn.Module):
    """Of a transformer: attention whose heads stay, and a gated multi-layer perceptron."""

    def __init__(self, width=8, hidden=16):
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width)

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (f(y).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Tied(nn.Module):
    """A layer that is called twice, and two with the same weight."""

    def __init__(self):
        super().__init__()
        self.twice, self.a, self.b, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.last(self.b(F.relu(self.a(self.twice(F.relu(self.twice(x)))))))


class Looks(nn.Module):
    """Reads a channel past all layers: by its place, by its size, by its sign, or from a hidden layer."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.how = nn.Linear(5, 6), nn.Linear(6, 2), how

    def forward(self, x):
        y = self.a(x)
        more = {
            "slice": lambda: y[:, 1:4],
            "norm": lambda: F.layer_norm(y, (6,)),
            "softmax": lambda: y.softmax(-1),
            "sum": lambda: y.sum(-1, keepdim=True),
            "sort": lambda: y.sort(-1).values,
            "sign": lambda: (y > 0).to(y.dtype),
            "argmax": lambda: y.argmax(-1),
            "where": lambda: torch.where(y[:, 3:4] > 0, y[:, 1:2], x),
            "hidden": lambda: y,
            "matmul": lambda: y @ y.T,
            "flip": lambda: F.relu(y.flip(-1)),
        }
        return self.b(F.relu(y)), more[self.how]()


MODELS = {
    "mlp": lambda: (
        nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 9, bias=False), nn.Tanh(), nn.Linear(9, 2)),
        torch.randn(4, 6),
    ),
    "plain": lambda: (
        nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 7, 3, padding=2, stride=2, dilation=2),
            nn.Sigmoid(),
            nn.Conv2d(7, 5, 3),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(5, 4),
        ),
        torch.randn(2, 1, 9, 9),
    ),
    "padded otherwise": lambda: (
        nn.Sequential(
            nn.Conv1d(2, 6, 3), nn.ELU(), nn.Conv1d(6, 5, 3, padding=2, padding_mode="replicate"), nn.Conv1d(5, 2, 1)
        ),
        torch.randn(2, 2, 7),
    ),
    "transposed": lambda: (
        nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 5, 3, stride=2), nn.ReLU(), nn.ConvTranspose2d(5, 1, 2)
        ),
        torch.randn(2, 1, 6, 6),
    ),
    "residual": lambda: (Residual(), torch.randn(2, 1, 6, 6)),
    "concatenated": lambda: (Concatenated(), torch.randn(2, 1, 6, 6)),
    "nested": lambda: (Concatenated(nested=True), torch.randn(2, 1, 6, 6)),
    "depthwise": lambda: (Depthwise(), torch.randn(2, 1, 6, 6)),
    "block": lambda: (Block(), torch.randn(2, 5, 8)),
    "tied": lambda: (Tied(), torch.randn(2, 6)),
}


def some_slow(names, fast):
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


def kill(model, fraction, seed=0, outputs=True):
    """Zero whole outputs, or inputs, of all layers; statistics and biases as after a long training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
                module.bias.normal_(generator=generator)
                module.weight.normal_(generator=generator)
            elif isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
                dim = int(isinstance(module, nn.ConvTranspose2d) == outputs)
                if module.weight.shape[dim] > 1:
                    dead = torch.rand(module.weight.shape[dim], generator=generator) < fraction
                    dead[torch.randint(len(dead), (), generator=generator)] = False
                    module.weight.transpose(0, dim)[dead] = 0.0
    return model.double().eval()


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def assert_same(model, slimmed, *inputs):
    with torch.no_grad():
        torch.testing.assert_close(slimmed(*inputs), model(*inputs), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("outputs", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["outputs", "inputs"])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MODELS)
def test_is_smaller_and_the_same_function(name, seed, outputs):
    model, example = MODELS[name]()
    model, example = kill(model, 0.5, seed, outputs), example.double()
    before = copy.deepcopy(model.state_dict())
    slimmed = slim(model, torch.zeros_like(example))
    assert (parameters(slimmed) < parameters(model)) or name in ("nested", "tied")
    for batch in (example, 100 * example, example[:1]):
        assert_same(model, slimmed, batch)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])
    assert slimmed.slimming.parameters == (parameters(model), parameters(slimmed))


def test_a_constant_is_another_number_at_the_borders():
    """An image of one pixel has nothing but borders; what is made with it is right for larger ones."""
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        model[0].weight[:2] = 0.0
    slimmed = slim(model.double(), torch.randn(1, 1, 1, 1, dtype=torch.float64))
    assert_same(model, slimmed, torch.randn(1, 1, 5, 5, dtype=torch.float64))


@pytest.mark.parametrize("name", some_slow(MODELS, {"residual", "block"}))
def test_nothing_dead_nothing_changed(name):
    model, example = MODELS[name]()
    model = kill(model, 0.0)
    slimmed = slim(model, example.double())
    assert len(str(slimmed.slimming).splitlines()) == 2  # a title and a sum
    assert slimmed.state_dict().keys() == model.state_dict().keys()
    for key, tensor in slimmed.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key])


HOWS = ["argmax", "flip", "hidden", "matmul", "norm", "sign", "slice", "softmax", "sort", "sum", "where"]


@pytest.mark.parametrize("how", some_slow(HOWS, {"flip", "hidden", "sign", "where"}))
def test_channels_that_are_read_past_the_layers_stay(how):
    """Channel 1 is a constant and 3 is not read by the next layer, but the outputs show both."""
    model = Looks(how)
    with torch.no_grad():
        model.a.weight[1] = 0.0
        model.b.weight[:, 3] = 0.0
    slimmed = slim(model, torch.randn(4, 5))
    assert slimmed.a.weight.shape == (6, 5)
    torch.testing.assert_close(slimmed(torch.ones(4, 5)), model(torch.ones(4, 5)))


class Images(L.LightningModule):
    """Learns to tell where an image is bright."""

    def __init__(self):
        super().__init__()
        self.network = Residual(width=16)

    def forward(self, images):
        return self.network(images)

    def training_step(self, batch, _):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)


def test_a_network_that_was_trained_with_channel_masks():
    """Dead channels have had means, gammas and betas of their own before they died."""
    images = torch.randn(96, 1, 8, 8)
    labels = images.mean((2, 3)).squeeze(1).mul(10).round().clamp(-1, 1).long() + 1
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=16)
    model = Images()
    make_trainer(
        GMP(0.5, start=0, end=0.8, pattern="channel", targets=["*reduce*", "*spatial*"], verbose=False), max_epochs=4
    ).fit(model, data)
    norm = model.network.spatial[1]
    dead = ~model.network.spatial[0].weight.detach().flatten(1).any(1)
    constants = norm.bias - norm.running_mean * norm.weight * (norm.running_var + norm.eps).rsqrt()
    assert dead.any()
    assert (constants[dead] > 0).any()  # which ReLU hands on
    slimmed = slim(model, images[:2])
    assert isinstance(slimmed, Images)
    assert slimmed.network.spatial[0].weight.shape[0] == int((~dead).sum())  # nothing is padded behind it
    left = int(model.network.reduce[0].weight.detach().flatten(1).any(1).sum())
    assert left <= slimmed.network.reduce[0].weight.shape[0] <= left + 1  # one constant at most is padded
    model.eval()
    torch.testing.assert_close(slimmed(images), model(images), rtol=1e-4, atol=1e-5)


SHAPES = {1: (2, 3, 8), 2: (2, 3, 4, 4), 3: (2, 3, 4, 4, 4)}
ARGUMENTS = {
    **{f"{kind}_pool{n}d": (2,) for kind in ("max", "avg") for n in SHAPES},
    **{f"adaptive_avg_pool{n}d": ([2] * n,) for n in SHAPES},
    **{f"upsample_nearest{n}d": ([8] * n,) for n in SHAPES},
    "_adaptive_avg_pool2d": ([2, 2],),
    "_native_batch_norm_legit_no_training": (*torch.rand(4, 3) + 0.5, 0.1, 1e-5),
    "batch_norm": (*torch.rand(4, 3) + 0.5, False, 0.1, 1e-5, False),
    "_unsafe_view": ([6, -1],),
    "add": (torch.ones(3, 1, 1),),
    "chunk": (2, 1),
    "clamp": (-0.5, 0.5),
    "div": (torch.full((3, 1, 1), 2.0),),
    "expand": ([5, 2, 3, 4, 4],),
    "flatten.using_ints": (1,),
    "mean.dim": ([2, 3],),
    "mul": (torch.zeros(3, 1, 1),),
    "permute": ([0, 2, 3, 1],),
    "prelu": (torch.ones(3),),
    "reshape": ([2, -1],),
    "select.int": (1, 1),
    "slice.Tensor": (1, 1, 3),
    "split.Tensor": (2, 1),
    "split_with_sizes": ([1, 2], 1),
    "squeeze.dim": (0,),
    "sub": (torch.ones(3, 1, 1),),
    "transpose.int": (1, 2),
    "unsqueeze": (0,),
    "view": ([2, -1],),
}


@pytest.mark.parametrize("op", sorted(_HANDS_ON))
def test_what_hands_on_nan_hides_none(op):
    """Other numbers in place of NaN change nothing where the result is a number."""
    name = next((name for name in ARGUMENTS if name.split(".")[0] == op), op)
    packet = getattr(torch.ops.aten, op)
    function = getattr(packet, name.split(".")[1]) if "." in name else packet
    shape = SHAPES[int(op[-2])] if op[-1] == "d" and op[-2].isdigit() else SHAPES[2]
    x = torch.randn((3, 4) if op == "t" else shape)
    unknown = torch.rand(x.shape) < 0.1

    def run(filled):
        if op == "cat":
            return [packet([filled, x.exp()], 1)]
        result = function(filled, *ARGUMENTS.get(name, ()))
        return [part for part in (result if isinstance(result, tuple | list) else [result]) if part.numel()]

    with_nan = run(x.masked_fill(unknown, torch.nan))
    for numbers in (torch.randn_like(x), 100 * torch.randn_like(x)):
        for expected, found in zip(with_nan, run(x.where(~unknown, numbers)), strict=True):
            known = ~expected.isnan()
            if op not in ("sqrt",):  # of negative numbers
                assert known.any() or op == "mean"
            assert torch.equal(expected[known], found[known])


def test_keeps_types_and_what_requires_grad():
    model = kill(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3, bias=False)), 0.5).bfloat16()
    model[0].bias.requires_grad = False
    slimmed = slim(model, {"input": torch.randn(2, 6, dtype=torch.bfloat16)})
    assert slimmed[0].weight.shape[0] == slimmed[2].weight.shape[1] == int(model[0].weight.any(1).sum())
    assert {p.dtype for p in slimmed.parameters()} == {torch.bfloat16}
    assert [p.requires_grad for p in slimmed.parameters()] == [True, False, True, True]  # a bias of the constants last
    assert slimmed[0].out_features == slimmed[2].in_features == slimmed[0].weight.shape[0]
    assert not slimmed.training
    rows = slimmed.slimming.to_dict()["layers"]
    assert [row["before"] for row in rows] == [(8, 6), (3, 8)]
    assert copy.deepcopy(slimmed).slimming == slimmed.slimming


def test_one_channel_is_left_of_a_dead_layer():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        model[2].weight.zero_()
    slimmed = slim(model, torch.randn(2, 4))
    assert [layer.weight.shape for layer in slimmed if isinstance(layer, nn.Linear)] == [(1, 4), (1, 1), (2, 1)]
    torch.testing.assert_close(slimmed(torch.ones(2, 4)), model(torch.ones(2, 4)))


def test_what_is_left_is_a_multiple():
    model = nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 9), nn.ReLU(), nn.Linear(9, 3)).double()
    with torch.no_grad():
        model[0].weight[:9] = 0.0
        model[2].weight[:4] = 0.0
    slimmed = slim(model, torch.randn(2, 4).double(), multiple_of=8)
    assert [len(layer.weight) for layer in slimmed if isinstance(layer, nn.Linear)] == [16, 8, 3]
    assert_same(model, slimmed, torch.randn(5, 4).double())
    with pytest.raises(ValueError, match="Expected argument `multiple_of` to be at least 1, but got 0"):
        slim(model, torch.randn(2, 4), multiple_of=0)


def test_a_wrong_result_is_not_returned(monkeypatch):
    model = kill(MODELS["plain"]()[0], 0.5)
    right = slimming._fold

    def wrong(layer, known):
        right(layer, known)
        layer.weight.data[0] += 0.1

    monkeypatch.setattr(slimming, "_fold", wrong)
    with pytest.raises(ValueError, match="Expected equal outputs after slimming, but they differ by"):
        slim(model, torch.zeros(2, 1, 9, 9, dtype=torch.float64))


@pytest.mark.parametrize("side", ["in", "both"])
def test_wrong_groups_are_not_believed(monkeypatch, side):
    """If torch-pruning were to say that other channels belong together, none would be removed."""
    model, example = MODELS["residual"]()
    find = channels.find_groups

    def shifted(*args):
        for group in find(*args):
            yield [m._replace(indices=m.indices.roll(1)) if m.side == side else m for m in group]

    monkeypatch.setattr(slimming, "find_groups", shifted)
    model = kill(model, 0.5)
    slimmed = slim(model, example.double())
    assert_same(model, slimmed, example.double())


def test_what_has_a_size_of_its_own_keeps_its_channels():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 2)
            self.register_buffer("scale", torch.arange(6.0) - 2)

        def forward(self, x):
            return self.c(F.relu(self.b(self.scale * self.a(x))))

    model = kill(Scaled(), 0.5)
    slimmed = slim(model, torch.randn(2, 5).double())
    assert slimmed.a.weight.shape == (6, 5)
    assert slimmed.c.weight.shape == (2, int(model.b.weight.any(1).sum()))
    assert_same(model, slimmed, torch.randn(2, 5).double())


def test_random_numbers_are_no_constants():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.a(x).sum() + self.b(torch.rand(len(x), 4))

    model, example = Noisy(), torch.randn(1, 3)  # of more samples, the numbers would differ
    program = torch.export.export(model.eval(), (example,)).run_decompositions({})
    assert Unknowns(program, model).trace(example).inputs["b"][0].constant.isnan().all()


def test_what_cannot_be_written_down_is_refused():
    class Branches(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(ValueError, match=r"Expected a model that `torch.export` can write down, but got"):
        slim(Branches(3, 3), torch.randn(2, 3))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch_pruning", None)
    with pytest.raises(ModuleNotFoundError, match=r"lightning-sparse\[slim\]"):
        slim(nn.Linear(2, 2), torch.randn(1, 2))
