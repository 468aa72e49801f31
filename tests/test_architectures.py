"""Real architectures, tiny and with random weights, train three steps under every strategy, and the laws hold."""

from collections import Counter

import lightning as L
import pytest
import torch
import transformers as hf
from torch import nn
from torch.utils.data import DataLoader

import lightning_sparse
from tests.helpers.assertions import assert_sparse
from tests.helpers.models import make_trainer
from tests.helpers.strategies import SETTINGS

# --- architectures: a model, a batch of two samples, how many weights of which layers --------------------------------

BODY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {"vocab_size": 50, "max_position_embeddings": 16}
SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def tokens():
    return torch.randint(3, 50, (2, 6))


def images():
    return {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}


def bert():
    model = hf.BertForMaskedLM(hf.BertConfig(**BODY, **TEXT))  # the decoder is tied to the embedding
    return model, {"input_ids": tokens(), "labels": tokens()}, {"Linear": 2 * 6 + 1}


def gpt2():
    model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2))
    return model, {"input_ids": tokens(), "labels": tokens()}, {"Conv1D": 2 * 4}


def llama():
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**BODY, **TEXT, num_key_value_heads=1))
    return model, {"input_ids": tokens(), "labels": tokens()}, {"Linear": 2 * 7 + 1}


def t5():
    config = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    model = hf.T5ForConditionalGeneration(hf.T5Config(**config, decoder_start_token_id=0))
    return model, {"input_ids": tokens(), "labels": tokens()}, {"Linear": (4 + 2) + (8 + 2)}


def whisper():
    sizes = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in WHISPER_SIDE.items()}
    lengths = {"vocab_size": 50, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16}
    model = hf.WhisperForConditionalGeneration(hf.WhisperConfig(d_model=16, **sizes, **lengths, **SPECIAL_TOKENS))
    batch = {"input_features": torch.randn(2, 8, 16), "labels": tokens()}
    return model, batch, {"Conv1d": 2, "Linear": (4 + 2) + (8 + 2)}


WHISPER_SIDE = {"layers": 1, "attention_heads": 2, "ffn_dim": 32}


def wav2vec2():
    features = {"conv_dim": (8, 8), "conv_kernel": (4, 3), "conv_stride": (2, 2), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}  # a parametrized convolution
    model = hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**BODY, **features, **positions, vocab_size=20, mask_time_prob=0.0))
    batch = {"input_values": torch.randn(2, 64), "labels": torch.randint(1, 20, (2, 3))}
    return model, batch, {"Conv1d": 2, "Linear": 1 + 2 * 6 + 1}


def clip():
    text = {**BODY, **TEXT, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    vision = {**BODY, "image_size": 32, "patch_size": 16}
    model = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    batch = {"input_ids": tokens(), "pixel_values": images()["pixel_values"], "return_loss": True}
    return model, batch, {"Conv2d": 1, "Linear": 2 * 2 * 6 + 2}


def vit():
    model = hf.ViTForImageClassification(hf.ViTConfig(**BODY, image_size=32, patch_size=16))
    return model, images(), {"Conv2d": 1, "Linear": 2 * 6 + 1}


def resnet():
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="bottleneck")
    return hf.ResNetForImageClassification(config), images(), {"Conv2d": 1 + (3 + 0) + (3 + 1), "Linear": 1}


def mobilenet():
    config = hf.MobileNetV1Config(depth_multiplier=0.1, min_depth=4, image_size=32)
    return hf.MobileNetV1ForImageClassification(config), images(), {"Conv2d": 1 + 2 * 13, "Linear": 1}


def convnext():
    config = hf.ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2, image_size=32)
    return hf.ConvNextForImageClassification(config), images(), {"Conv2d": 1 + 1 + 2, "Linear": 2 * 2 + 1}


class Tagger(nn.Module):
    """Recurrent layers of two kinds, one with a projection."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(50, 8)
        self.lstm = nn.LSTM(8, 8, proj_size=4, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(8, 8, num_layers=2, batch_first=True)
        self.cell = nn.GRUCell(8, 8)
        self.tags = nn.Bilinear(8, 8, 5)

    def forward(self, input_ids):
        words = self.gru(self.lstm(self.words(input_ids))[0])[0]
        return self.tags(words, self.cell(words[:, 0])[:, None].expand_as(words).contiguous())


def tagger():
    return Tagger(), {"input_ids": tokens()}, {"LSTM": 2 * 3, "GRU": 2 * 2, "GRUCell": 2, "Bilinear": 1}


def transformer():
    sizes = {"d_model": 16, "nhead": 2, "num_encoder_layers": 1, "num_decoder_layers": 1, "dim_feedforward": 32}
    batch = {"src": torch.randn(2, 5, 16), "tgt": torch.randn(2, 4, 16)}
    attentions = 1 + 2  # each with `in_proj_weight` and `out_proj.weight`
    kinds = {"MultiheadAttention": attentions, "NonDynamicallyQuantizableLinear": attentions, "Linear": 2 * 2}
    return nn.Transformer(**sizes, batch_first=True), batch, kinds


class UNet(nn.Module):
    """One stage down, one up, with a skip connection."""

    def __init__(self):
        super().__init__()
        self.top, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2)
        self.up, self.out = nn.ConvTranspose2d(16, 8, 2, stride=2), nn.Conv2d(16, 1, 1)

    def forward(self, pixel_values):
        top = self.top(pixel_values).relu()
        return self.out(torch.cat([top, self.up(self.down(top).relu())], dim=1))


def unet():
    return UNet(), {"pixel_values": torch.randn(2, 3, 16, 16)}, {"Conv2d": 3, "ConvTranspose2d": 1}


HUGGING_FACE = [bert, gpt2, llama, t5, whisper, wav2vec2, clip, vit, resnet, mobilenet, convnext]

# --- laws ------------------------------------------------------------------------------------------------------------

# But for those whose pattern leaves layers dense that do not divide, see tests/engine/test_patterns.py.
STRATEGIES = ["SparseTraining", *(name for name in lightning_sparse.strategies.__all__ if name != "SSTE")]


class Module(L.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        output = self.net(**batch)
        return output.square().mean() if torch.is_tensor(output) else output.loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def kind_of_layer(module, parameter):
    return type(module.get_submodule(parameter.rpartition(".")[0])).__name__


@pytest.mark.filterwarnings("ignore:.*has pruned all:UserWarning")  # layers this small do vanish
@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("build", [*HUGGING_FACE, tagger, transformer, unet])
def test_every_strategy_trains_every_architecture(build, name):
    net, batch, kinds = build()
    module, callback, setting = Module(net), SETTINGS[name].build(), SETTINGS[name]
    keys, ids = list(module.state_dict()), [id(parameter) for parameter in module.parameters()]
    epochs = 2 if callback.rounds else 1
    trainer = make_trainer(callback, max_epochs=epochs)
    trainer.fit(module, DataLoader([batch] * 3, batch_size=None))

    assert trainer.global_step == 3 * epochs
    assert (list(module.state_dict()), [id(parameter) for parameter in module.parameters()]) == (keys, ids)
    assert Counter(kind_of_layer(module, target) for target in callback.targets) == kinds

    assert_sparse(module, callback)
    weights = [module.get_parameter(target) for target in callback.targets]
    zeros, total = sum(int((weight == 0).sum()) for weight in weights), sum(weight.numel() for weight in weights)
    assert callback.sparsity == callback.metrics()["sparsity/total"] == zeros / total
    if setting.sparsity is None:
        assert 0 < zeros < total
    else:  # to the weight, or to one in each layer
        pruned = sum(int((~callback.mask(target)).sum()) for target in callback.targets)
        assert abs(pruned - setting.sparsity * total) <= (1 if callback.distribution == "global" else len(weights))

    report = callback.report()
    assert report.totals["flops/inference"] > 0
    assert 0 < report.totals["flops/inference_ratio"] < 1
    assert all(row.flops for row in report.rows if row.treated)

    with torch.no_grad():
        output = net.eval()(**batch)
    for tensor in (
        [output] if torch.is_tensor(output) else [value for value in output.values() if torch.is_tensor(value)]
    ):
        assert tensor.isfinite().all()
