"""Counts against closed formulas, and against PyTorch's own counter of the kernels that really run."""

import math
import pickle
import random
import warnings
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_sparse.flops import FlopCount, FlopRecorder, count_flops
from lightning_sparse.functional import count_nonzeros


def counted_by_torch(module, *inputs, **kwargs):
    """Multiply-accumulates of the matrix products and convolutions that PyTorch dispatches."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # The fused attention of the CPU is unknown to the counter.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            module.eval()(*inputs, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


def zero_some(parameter, zeros):
    """Zero the given number of entries, at random places, and no other."""
    with torch.no_grad():
        parameter.fill_(1.0).view(-1)[torch.randperm(parameter.numel())[:zeros]] = 0.0


class Functional(nn.Module):
    """A forward pass given as a function of the module, with two weights of its own."""

    def __init__(self, function, *shapes):
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(shape) for shape in shapes)
        self.function = function

    def forward(self, *inputs):
        return self.function(self, *inputs)


def size_after_convolution(size, kernel, stride, padding, dilation):
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


# --- single layers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5)])
def test_linear(shape):
    count = count_flops(nn.Linear(5, 7), torch.randn(shape))
    assert count.by_layer == {"weight": math.prod(shape[:-1]) * 5 * 7}
    assert (count.rest, count.uncounted) == (0, {})


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize(("stride", "padding", "dilation", "groups"), [(1, 0, 1, 1), (2, 1, 1, 2), (3, 2, 2, 4)])
def test_convolution(dim, stride, padding, dilation, groups):
    size, kernel, inputs, outputs, batch = 11, 3, 4, 8, 2
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1](inputs, outputs, kernel, stride, padding, dilation, groups)
    side = size_after_convolution(size, kernel, stride, padding, dilation)
    expected = batch * outputs * side**dim * (inputs // groups) * kernel**dim
    assert count_flops(layer, torch.randn(batch, inputs, *[size] * dim)).by_layer == {"weight": expected}


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_convolution_that_keeps_the_size(padding_mode):
    layer = nn.Conv2d(3, 4, (3, 5), padding="same", padding_mode=padding_mode)
    assert count_flops(layer, torch.randn(2, 3, 6, 7)).by_layer == {"weight": 2 * 6 * 7 * 4 * 3 * 15}


def test_convolution_without_batch():
    assert count_flops(nn.Conv2d(3, 4, 3), torch.randn(3, 6, 7)).by_layer == {"weight": 4 * 5 * 4 * 3 * 9}


@pytest.mark.parametrize(("stride", "padding", "groups"), [(1, 0, 1), (2, 1, 2)])
def test_transposed_convolution_multiplies_every_input_pixel_by_every_weight(stride, padding, groups):
    layer = nn.ConvTranspose2d(4, 8, 3, stride, padding, groups=groups)
    expected = 2 * 5 * 6 * 4 * (8 // groups) * 9
    assert count_flops(layer, torch.randn(2, 4, 5, 6)).by_layer == {"weight": expected}


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize("batch_first", [False, True])
def test_recurrent_layers(kind, gates, batch_first):
    steps, batch, inputs, hidden = 5, 3, 4, 6
    layer = kind(inputs, hidden, num_layers=2, bidirectional=True, batch_first=batch_first)
    shape = (batch, steps, inputs) if batch_first else (steps, batch, inputs)
    expected = {}
    for end in ("", "_reverse"):
        for index, width in enumerate((inputs, 2 * hidden)):
            expected[f"weight_ih_l{index}{end}"] = steps * batch * gates * hidden * width
            expected[f"weight_hh_l{index}{end}"] = steps * batch * gates * hidden * hidden
    assert count_flops(layer, torch.randn(shape)).by_layer == expected


def test_packed_sequences_count_their_true_length():
    layer = nn.LSTM(4, 5, proj_size=3)
    packed = nn.utils.rnn.pack_sequence([torch.randn(5, 4), torch.randn(2, 4)])
    expected = {"weight_ih_l0": 7 * 20 * 4, "weight_hh_l0": 7 * 20 * 3, "weight_hr_l0": 7 * 3 * 5}
    assert count_flops(layer, packed).by_layer == expected


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTMCell, 4), (nn.GRUCell, 3), (nn.RNNCell, 1)])
def test_recurrent_cells(kind, gates):
    expected = {"weight_ih": 3 * gates * 6 * 4, "weight_hh": 3 * gates * 6 * 6}
    assert count_flops(kind(4, 6), torch.randn(3, 4)).by_layer == expected


@pytest.mark.parametrize("need_weights", [True, False])
def test_self_attention(need_weights):
    batch, length, width = 2, 5, 16
    x = torch.randn(batch, length, width)
    layer = nn.MultiheadAttention(width, 4, batch_first=True)
    count = count_flops(layer, x, x, x, need_weights=need_weights)
    tokens = batch * length
    assert count.by_layer == {"in_proj_weight": tokens * 3 * width**2, "out_proj.weight": tokens * width**2}
    assert count.rest == 2 * batch * length**2 * width


@pytest.mark.parametrize("need_weights", [True, False])
def test_cross_attention_with_sources_of_another_length(need_weights):
    batch, length, source, width = 2, 5, 7, 16
    query, memory = torch.randn(batch, length, width), torch.randn(batch, source, width)
    layer = nn.MultiheadAttention(width, 4, batch_first=True)
    count = count_flops(layer, query, memory, memory, need_weights=need_weights)
    in_proj = batch * width**2 * (length + 2 * source)
    assert count.by_layer == {"in_proj_weight": in_proj, "out_proj.weight": batch * length * width**2}
    assert count.rest == 2 * batch * length * source * width


def test_attention_with_separate_widths():
    layer = nn.MultiheadAttention(16, 4, kdim=6, vdim=10, batch_first=True)
    count = count_flops(layer, torch.randn(1, 5, 16), torch.randn(1, 7, 6), torch.randn(1, 7, 10))
    projections = {"q_proj_weight": 5 * 16 * 16, "k_proj_weight": 7 * 6 * 16, "v_proj_weight": 7 * 10 * 16}
    assert count.by_layer == {**projections, "out_proj.weight": 5 * 16 * 16}


def test_hugging_face_conv1d():
    layer = transformers.pytorch_utils.Conv1D(7, 5)
    assert count_flops(layer, torch.randn(2, 3, 5)).by_layer == {"weight": 2 * 3 * 5 * 7}


def test_bilinear():
    count = count_flops(nn.Bilinear(3, 4, 5), torch.randn(2, 6, 3), torch.randn(2, 6, 4))
    assert count.by_layer == {"weight": 12 * 3 * 4 * 5}


def test_encoder_layer_is_not_hidden_by_its_fused_kernel():
    width, hidden, batch, length = 16, 32, 2, 6
    layer = nn.TransformerEncoderLayer(width, 4, hidden, batch_first=True).eval()
    count = count_flops(layer, torch.randn(batch, length, width))
    assert sum(count.by_layer.values()) == batch * length * (4 * width**2 + 2 * width * hidden)
    assert torch.backends.mha.get_fastpath_enabled()


# --- weights used by functions -----------------------------------------------------------------------------------

X = torch.randn(2, 3, 4)


@pytest.mark.parametrize(
    ("function", "shape", "macs"),
    [
        (lambda m, x: F.linear(x, m.weights[0]), (5, 4), 6 * 20),
        (lambda m, x: x @ m.weights[0].T, (5, 4), 6 * 20),
        (lambda m, x: x.matmul(m.weights[0].t().contiguous().clone()), (5, 4), 6 * 20),
        (lambda m, x: x[0].mm(m.weights[0].view(4, 5)), (20,), 3 * 20),
        (lambda m, x: x[0, 0] @ m.weights[0], (4, 5), 20),
        (lambda m, x: m.weights[0].mv(x[0, 0]), (5, 4), 20),
        (lambda m, x: x[0, 0].dot(m.weights[0]), (4,), 4),
        (lambda m, x: x.bmm(m.weights[0].unsqueeze(0).expand(2, -1, -1)), (4, 5), 6 * 20),
        (lambda m, x: torch.baddbmm(torch.zeros(1), x, m.weights[0]), (2, 4, 5), 6 * 20),
        (lambda m, x: torch.addbmm(torch.zeros(1), x, m.weights[0]), (2, 4, 5), 6 * 20),
        (lambda m, x: torch.addmm(torch.zeros(1), x[0], m.weights[0]), (4, 5), 3 * 20),
        (lambda m, x: torch.zeros(3, 5).addmm_(x[0], m.weights[0]), (4, 5), 3 * 20),
        (lambda m, x: torch.tensordot(x, m.weights[0], ([1, 2], [1, 0])), (4, 3, 5), 2 * 60),
        (lambda m, x: torch.inner(x, m.weights[0]), (5, 4), 6 * 20),
        (lambda m, x: F.linear(x, m.weights[0].chunk(2)[1]), (10, 4), 6 * 20),
        (lambda m, x: F.linear(x, m.weights[0][3:, 1:5]), (8, 5), 6 * 20),
        (lambda m, x: F.linear(x.double(), m.weights[0].double()), (5, 4), 6 * 20),
        (lambda m, x: torch.einsum("...i,oi->...o", x, m.weights[0]), (5, 4), 6 * 20),
        (lambda m, x: torch.einsum("bti,io", x, m.weights[0]), (4, 5), 6 * 20),
        (lambda m, x: torch.einsum("...i,io", x, m.weights[0]), (4, 5), 6 * 20),
        (lambda m, x: torch.einsum("...ti,oi->to", x, m.weights[0]), (5, 4), 3 * 20),  # sums over the batch first
        (lambda m, x: torch.einsum("bti,io->bto", x[..., :1], m.weights[0]), (4, 5), 6 * 5),  # a 1 is broadcast
        (lambda m, x: torch.einsum("bti, tio -> bo", x, m.weights[0]), (3, 4, 5), 6 * 20),
    ],
)
def test_product_belongs_to_the_weight_behind_its_views(function, shape, macs):
    count = count_flops(Functional(function, shape), X)
    assert count.by_layer == {"weights.0": macs}
    assert count.rest == 0


@pytest.mark.parametrize(
    ("function", "macs"),
    [
        (lambda m, x: x @ x.mT, 2 * 3 * 3 * 4),
        (lambda m, x: torch.einsum("...ij,...kj->...ik", x, x), 2 * 3 * 3 * 4),
        (lambda m, x: torch.einsum("...ij,...jk", x, x.mT), 2 * 3 * 3 * 4),
        (lambda m, x: torch.einsum("bij,bkj->ik", x, x), 2 * 3 * 3 * 4),
        (lambda m, x: torch.einsum("bij,ckl->bi", x, x), 2 * 3),  # sums over j, c, k, l come before the product
        (lambda m, x: torch.einsum("bij->b", x), 0),
        (lambda m, x: F.scaled_dot_product_attention(x, x, x, is_causal=True), 2 * 3 * 3 * (4 + 4)),
        (lambda m, x: F.scaled_dot_product_attention(x, torch.ones(2, 7, 4), torch.ones(2, 7, 5)), 2 * 3 * 7 * 9),
        (lambda m, x: x @ (m.weights[0] * 2), 6 * 20),  # not the stored weight
    ],
)
def test_product_without_stored_weight_is_rest(function, macs):
    count = count_flops(Functional(function, (4, 5)), X)
    assert (count.by_layer, count.rest) == ({}, macs)


LEFT_TO_RIGHT = {"weights.0": 2 * 3 * 5, "weights.1": 2 * 5 * 7, "weights.2": 2 * 7 * 11}


@pytest.mark.parametrize(
    ("path", "by_layer", "rest"),
    [
        (None, LEFT_TO_RIGHT, 0),
        ((0, 1, 0, 2, 0, 1), LEFT_TO_RIGHT, 0),  # the result of a step goes to the end of the list
        # jk,kl->jl is a product of two weights, then ai,ij->aj, then aj,jl->al with no stored weight left
        ((3, 2, 0, 1, 0, 1), {"weights.0": 2 * 3 * 5, "weights.2": 5 * 7 * 11}, 2 * 5 * 11),
    ],
)
def test_einsum_of_many_factors_follows_the_order_of_contraction(path, by_layer, rest):
    def contract(m, x):
        return torch._VF.einsum("ai,ij,jk,kl->al", (x, *m.weights), path=path)

    module = Functional(contract, (3, 5), (5, 7), (7, 11))
    count = count_flops(module, torch.randn(2, 3))
    assert (count.by_layer, count.rest) == (by_layer, rest)
    assert count.dense == counted_by_torch(module, torch.randn(2, 3))


def test_weight_used_twice_counts_twice():
    count = count_flops(Functional(lambda m, x: F.linear(F.linear(x, m.weights[0]), m.weights[0]), (4, 4)), X)
    assert count.by_layer == {"weights.0": 2 * 6 * 16}


def test_tied_weights_count_under_the_first_name_and_answer_to_every_name():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    count = count_flops(net, X)
    assert count.by_layer == {"0.weight": 2 * 6 * 16}
    assert count.aliases == {"2.weight": "0.weight"}
    assert count.inference({"2.weight": 0.25}) == count.inference({"0.weight": 0.25}) == 6 * 16 / 2


def test_shared_module_counts_every_call():
    layer = nn.Linear(4, 4)
    assert count_flops(nn.Sequential(layer, nn.Tanh(), layer), X).by_layer == {"0.weight": 2 * 6 * 16}


# --- whole networks ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet():
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000))


@pytest.fixture(scope="module")
def resnet_count(resnet):
    return count_flops(resnet, torch.randn(1, 3, 224, 224))


def test_resnet50_has_4_09_giga(resnet_count):
    assert resnet_count.dense == pytest.approx(4.09e9, rel=0.005)
    assert (len(resnet_count.by_layer), resnet_count.rest) == (54, 0)
    assert resnet_count.uncounted["aten::batch_norm"] == 53
    assert "aten::adaptive_avg_pool2d" in resnet_count.uncounted


# Per cent of zeros in the 54 layers of the ResNet-50 that STR (Kusupati et al., ICML 2020) trained to an overall
# sparsity of 90.23 %, and the FLOPs that its authors report. Each block: its convolutions, then its shortcut.
STR_BLOCKS = """
83.28 89.48 85.80 83.34 / 89.89 90.60 91.70 / 88.07 87.03 90.99
85.95 93.91 93.13 94.96 / 95.31 91.50 93.66 / 94.61 94.86 93.38 / 93.26 93.21 94.14
88.85 96.14 93.19 97.20 / 95.36 95.06 94.84 / 96.77 95.59 94.99 / 96.06 96.10 94.94 / 95.49 95.66 94.49 /\
 95.09 94.92 93.14
90.32 95.66 91.14 96.79 / 93.69 93.98 90.48 / 87.57 84.37 80.29
"""


def test_resnet50_reproduces_the_budget_published_with_str(resnet_count):
    sparsities = {"resnet.embedder.embedder.convolution.weight": "59.80", "classifier.1.weight": "64.50"}
    for stage, line in enumerate(STR_BLOCKS.strip().splitlines()):
        for block, numbers in enumerate(line.split(" / ")):
            prefix = f"resnet.encoder.stages.{stage}.layers.{block}"
            layers = ("layer.0", "layer.1", "layer.2", "shortcut")
            for layer, number in zip(layers, numbers.split(), strict=False):
                sparsities[f"{prefix}.{layer}.convolution.weight"] = number
    assert sparsities.keys() == resnet_count.by_layer.keys()
    densities = {name: 1 - Fraction(number) / 100 for name, number in sparsities.items()}
    assert resnet_count.inference(densities) == pytest.approx(343e6, abs=0.5e6)


def test_mobilenet_v1_has_0_569_giga():
    net = transformers.MobileNetV1ForImageClassification(transformers.MobileNetV1Config(num_labels=1000))
    assert count_flops(net, torch.randn(1, 3, 224, 224)).dense == pytest.approx(0.569e9, rel=0.01)


def test_bert_with_keyword_inputs_and_dict_output():
    layers, width, hidden, vocabulary, batch, length = 2, 32, 64, 99, 3, 7
    config = transformers.BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=hidden,
    )
    net = transformers.BertForMaskedLM(config)
    tokens = torch.zeros(batch, length, dtype=torch.long)
    count = count_flops(net, input_ids=tokens, attention_mask=torch.ones_like(tokens))
    per_token = layers * (4 * width**2 + 2 * width * hidden) + width**2 + width * vocabulary
    assert sum(count.by_layer.values()) == batch * length * per_token
    assert count.rest == layers * 2 * batch * length**2 * width
    assert count.aliases["cls.predictions.decoder.weight"] == "bert.embeddings.word_embeddings.weight"
    assert count.uncounted["aten::embedding"] == 3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gpt2_with_cache_and_dict_output(attention):
    layers, width, vocabulary, batch, length = 2, 32, 99, 3, 7
    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_embd=width, n_layer=layers, n_head=4, attn_implementation=attention
    )
    tokens = torch.zeros(batch, length, dtype=torch.long)
    count = count_flops(transformers.GPT2LMHeadModel(config), tokens, use_cache=True)
    assert sum(count.by_layer.values()) == batch * length * (layers * 12 * width**2 + width * vocabulary)
    assert count.rest == layers * 2 * batch * length**2 * width


def test_count_agrees_with_the_kernels_that_run():
    net = nn.Transformer(16, 4, 1, 2, 32, batch_first=True)
    source, target = torch.randn(2, 7, 16), torch.randn(2, 5, 16)
    assert count_flops(net, source, target).dense == counted_by_torch(net, source, target)


# --- densities ---------------------------------------------------------------------------------------------------


def test_sparse_count_is_the_exact_sum_over_the_weights():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 7), nn.Linear(7, 3, bias=False))
    zeros = {"0.weight": 101, "2.weight": 895, "3.weight": 20}
    for name, number in zeros.items():
        zero_some(net.get_parameter(name), number)
    count = count_flops(net, torch.randn(5, 3, 6, 6))
    # A weight of the convolution is used at 16 positions of each of 5 images, one of the others once per image.
    uses = {"0.weight": 5 * 16, "2.weight": 5, "3.weight": 5}
    kept = {"0.weight": 216 - 101, "2.weight": 896 - 895, "3.weight": 21 - 20}
    assert count.by_layer_sparse == {name: uses[name] * kept[name] for name in uses}
    assert count.sparse == sum(uses[name] * kept[name] for name in uses)
    assert count.densities["2.weight"] == Fraction(1, 896)


def test_sparse_count_includes_the_rest():
    x = torch.randn(2, 5, 16)
    layer = nn.MultiheadAttention(16, 4, batch_first=True)
    nn.init.zeros_(layer.in_proj_weight)
    assert count_flops(layer, x, x, x).sparse == 2 * 5 * 16**2 + 2 * 2 * 25 * 16


def test_prices_by_formula():
    count = FlopCount(by_layer={"a": 10, "b": 100, "c": 1000}, rest=7)
    assert count.inference({}) == count.dense == 1117
    assert count.inference({"a": 0.5, "b": 0}) == 5 + 1000 + 7
    assert count.training({}, {}) == 3 * 1117
    # a: straight-through; b: masked gradient; c: only the gradient is sparse
    training = count.training({"a": 0.5, "b": 0.25}, {"b": 0.25, "c": 0.125})
    assert training == (2 * 0.5 + 1) * 10 + 3 * 0.25 * 100 + (2 + 0.125) * 1000 + 3 * 7


def test_price_is_rounded_once():
    count = FlopCount(by_layer={str(i): 3 for i in range(10)})
    assert count.inference({str(i): Fraction(1, 3) for i in range(10)}) == 10.0
    assert FlopCount(by_layer={"a": 10**17 + 1}, rest=-(10**17)).inference({}) == 1.0


def test_count_nonzeros_takes_both_signs_of_zero_and_nan():
    assert count_nonzeros([torch.tensor([0.0, -0.0, 1.0, math.nan])]) == 2


def test_count_survives_pickle_and_prints_every_part():
    count = FlopCount({"a.weight": 1000}, 20, {"a.weight": Fraction(1, 4)}, {"aten::tanh": 3})
    assert pickle.loads(pickle.dumps(count)) == count
    lines = str(count).splitlines()
    assert lines[1].split() == ["a.weight", "1", "k", "250", "25.00%"]
    assert lines[2].split() == ["(without", "weight)", "20", "20", "100.00%"]
    assert lines[3].split() == ["total", "1.02", "k", "270", "26.47%"]
    assert lines[-1] == "not counted: aten::tanh (3)"
    assert str(FlopCount({})).endswith("not counted: nothing")


# --- inputs, outputs, devices ------------------------------------------------------------------------------------


class Nested(nn.Module):
    """Takes and returns containers, and objects that no library has heard of."""

    class Output:
        def __init__(self, tensor):
            self.hidden = [{"tensor": tensor}]
            self.myself = self

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, batch, times, *, name=None):
        assert not torch.is_grad_enabled()
        if name != "x":
            return None
        return self.Output(sum(self.layer(batch[name][i]) for i in range(times)))


def test_containers_constants_and_unknown_outputs():
    count = count_flops(Nested(), {"x": [torch.randn(2, 4)] * 3}, 3, name="x")
    assert count.by_layer == {"layer.weight": 3 * 2 * 12}
    assert count.uncounted == {"aten::add": 3}  # nothing about tracing


def test_attention_recognises_one_tensor_given_three_times():
    class Same(nn.Module):
        def forward(self, a, b):
            assert a is b
            return a @ b

    assert count_flops(Same(), *[torch.eye(3)] * 2).rest == 27


def test_uncounted_work_is_named():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x @ x

    count = count_flops(Functional(lambda m, x: Square.apply(x).tanh()), torch.eye(3))
    assert count.uncounted == {"prim::PythonOp.Square": 1, "aten::tanh": 1}
    assert count.dense == 0


def test_names_are_those_without_compile():
    net = nn.Sequential(torch.compile(nn.Linear(4, 3), backend="eager"), nn.Linear(3, 2))
    net[1].compile(backend="eager")
    expected = {"0.weight": 6 * 12, "1.weight": 6 * 6}
    for candidate in (net, torch.compile(net, backend="eager")):
        torch._dynamo.utils.counters.clear()
        assert count_flops(candidate, X).by_layer == expected
        assert not torch._dynamo.utils.counters  # nothing was compiled
    assert net[1]._compiled_call_impl is not None
    net(X)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_autocast_and_its_cache_do_not_hide_the_weight():
    layer = nn.Linear(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        layer(X)  # the cast weight now is in the cache
        assert count_flops(layer, X).by_layer == {"weight": 6 * 12}
        assert torch.is_autocast_cache_enabled()


def test_inference_mode():
    with torch.inference_mode():
        assert count_flops(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), X[0]).by_layer == {"0.weight": 36}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_counts_the_same_and_keeps_its_random_state():
    net = nn.Sequential(nn.Linear(4, 8), nn.LSTM(8, 5)).cuda()
    state = torch.cuda.get_rng_state()
    count = count_flops(net, X.cuda())
    assert count.by_layer == count_flops(net.cpu(), X).by_layer
    assert torch.equal(torch.cuda.get_rng_state(), state)


# --- the module stays as it was ----------------------------------------------------------------------------------


class Messy(nn.Module):
    """Does everything a forward pass should not: draws, counts, caches, and works in place on its input."""

    def __init__(self, traceable=True):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=True), nn.Dropout(0.5))
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("last", torch.zeros(1))
        self.traceable = traceable

    def forward(self, x):
        if torch.jit.is_tracing() and not self.traceable:
            raise RuntimeError("Not while tracing.")
        self.calls += 1
        self.last = x.mean()
        self.cache = x
        x += torch.rand_like(x)
        return self.norm(self.net(x))


def snapshot(module):
    return {
        "state": {name: value.clone() for name, value in module.state_dict().items()},
        "parameters": [(name, id(p), p._version, p.requires_grad) for name, p in module.named_parameters()],
        "buffers": [(name, id(buffer)) for name, buffer in module.named_buffers()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in module.parameters()],
        "modes": [m.training for m in module.modules()],
        "attributes": [sorted(vars(m)) for m in module.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()],
        "random": (torch.get_rng_state(), random.getstate()),
        "grad": torch.is_grad_enabled(),
    }


def assert_same(before, after):
    for name, value in before["state"].items():
        torch.testing.assert_close(after["state"][name], value, rtol=0, atol=0)
    torch.testing.assert_close(after["gradients"], before["gradients"], rtol=0, atol=0)
    assert torch.equal(after["random"][0], before["random"][0])
    assert after["random"][1] == before["random"][1]
    for key in ("parameters", "buffers", "modes", "attributes", "hooks", "grad"):
        assert after[key] == before[key], key


@pytest.mark.parametrize("traceable", [True, False])
def test_module_inputs_and_random_state_are_untouched(traceable):
    net = Messy(traceable).train()
    net.norm.eval()
    net(torch.randn(3, 4)).sum().backward()
    del net.cache
    x = torch.randn(3, 4)
    before, x_before = snapshot(net), x.clone()
    count = count_flops(net, x)
    assert count.by_layer == {"net.0.weight": 3 * 16}
    assert_same(before, snapshot(net))
    assert torch.equal(x, x_before)


def test_nothing_is_printed_or_warned(caplog, capfd):
    class Noisy(nn.Module):
        def forward(self, x):
            warnings.warn("noise", stacklevel=1)
            return x.tanh() if x.sum() > 0 else x @ x  # the tracer warns about such a branch

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        count_flops(Noisy(), torch.eye(3))
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_error_of_the_module_itself_is_raised_and_leaves_nothing_behind():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 5)).train()
    x = torch.randn(2, 4)
    before = snapshot(net)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        count_flops(net, x)
    assert_same(before, snapshot(net))
    assert torch.backends.mha.get_fastpath_enabled()


# --- what cannot be traced ---------------------------------------------------------------------------------------


class Untraceable(nn.Module):
    """Two good children, one weight of its own, and a forward pass that the tracer refuses."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)
        self.own = nn.Parameter(torch.randn(3, 3))

    def forward(self, x):
        if torch.jit.is_tracing():
            raise RuntimeError("Not while tracing.")
        return self.head(self.head.weight.new_ones(4) * self.attention(x, x, x)[0]) @ self.own


def test_submodules_are_counted_where_the_whole_cannot_be_traced():
    count = count_flops(nn.Sequential(Untraceable(), nn.Linear(3, 2)), X)
    assert count.by_layer == {
        "0.attention.in_proj_weight": 6 * 3 * 16,
        "0.attention.out_proj.weight": 6 * 16,
        "0.head.weight": 6 * 12,
        "1.weight": 6 * 6,
    }
    assert count.rest == 2 * 2 * 9 * 4
    missing = [name for name in count.uncounted if "tracing raised RuntimeError" in name]
    assert missing == [
        "all but the layers inside Sequential, tracing raised RuntimeError",
        "all but the layers inside `0` (Untraceable), tracing raised RuntimeError",
    ]


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")
def test_torchscript_is_named_where_it_cannot_be_counted():
    net = nn.Sequential(nn.Linear(4, 3), torch.jit.script(nn.Linear(3, 2)))
    count = count_flops(net, X)
    assert count.by_layer == {"0.weight": 6 * 12}
    assert count.uncounted["TorchScript module `1`"] == 1


def test_recorder_counts_a_training_step_and_does_not_change_it():
    def step(net):
        hidden = net.net(torch.ones(3, 4))  # not through the forward of the whole
        (net.norm(hidden) ** 2).sum().backward()
        return [p.grad for p in net.parameters()], torch.rand(1), dict(net.state_dict())

    torch.manual_seed(0)
    net = Messy()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    torch.manual_seed(1)
    expected = step(net)
    net.zero_grad()
    net.load_state_dict(state)
    torch.manual_seed(1)
    with FlopRecorder(net) as recorder:
        actual = step(net)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert recorder.count().by_layer == {"net.0.weight": 3 * 16}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_recorder_sees_the_inputs_before_other_hooks_do():
    layer = nn.Linear(8, 3)
    layer.register_forward_pre_hook(lambda module, inputs: torch.cat([*inputs, *inputs], -1))
    with FlopRecorder(layer) as recorder:
        layer(X)
    assert recorder.count().by_layer == {"weight": 6 * 24}


def test_recorder_sees_the_calls_of_a_compiled_function_and_does_not_break_it():
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    compiled = torch.compile(lambda x: net(x), backend="eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    with FlopRecorder(net) as recorder:
        compiled(X)
    assert recorder.count().by_layer == {"0.weight": 6 * 12, "1.weight": 6 * 6}
    assert not torch._dynamo.utils.counters
    compiled(X)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_recorder_adds_up_calls():
    layer = nn.Linear(4, 3)
    with FlopRecorder(layer) as recorder:
        layer(X)
        layer(X[:1])
    layer(X)
    assert recorder.count().by_layer == {"weight": (6 + 3) * 12}


def test_recorder_may_be_left_twice_and_copied():
    recorder = FlopRecorder(nn.Linear(4, 3))
    with recorder:
        recorder.module(X)
    recorder.__exit__(None, None, None)
    assert pickle.loads(pickle.dumps(recorder)).count() == recorder.count()


def test_recorder_goes_on_after_a_failed_call():
    class FailsInTraining(nn.Linear):
        def forward(self, x):
            if self.training:
                raise ValueError("Not in training.")
            return super().forward(x)

    layer = FailsInTraining(4, 3)
    net = nn.Sequential(layer)
    with FlopRecorder(net) as recorder:
        with pytest.raises(ValueError, match="Not in training"):
            net(X)
        net[0].eval()(X)
    assert recorder.count().by_layer == {"0.weight": 2 * 6 * 12}


def test_two_recorders_at_once_count_the_same():
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with FlopRecorder(net) as first, FlopRecorder(net) as second:
        net(torch.randn(1, 4))
    assert first.count().by_layer == second.count().by_layer == {"0.weight": 12, "1.weight": 6}
