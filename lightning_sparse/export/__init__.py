"""From the trained model to what other programs load."""

from lightning_sparse.export.acceleration import Acceleration, LayerTime, accelerate
from lightning_sparse.export.explanation import Explanation, LayerFacts, Verdict, explain
from lightning_sparse.export.handover import (
    Handover,
    flush_subnormals,
    to_onnx,
    to_openvino,
    to_program,
    to_safetensors,
    to_state_dict,
)
from lightning_sparse.export.inspection import inspect_checkpoint
from lightning_sparse.export.packing import load_sparse, read_sparse, save_sparse
from lightning_sparse.export.slimming import SlimLayer, Slimming, slim

__all__ = [
    "Acceleration",
    "Explanation",
    "Handover",
    "LayerFacts",
    "LayerTime",
    "SlimLayer",
    "Slimming",
    "Verdict",
    "accelerate",
    "explain",
    "flush_subnormals",
    "inspect_checkpoint",
    "load_sparse",
    "read_sparse",
    "save_sparse",
    "slim",
    "to_onnx",
    "to_openvino",
    "to_program",
    "to_safetensors",
    "to_state_dict",
]
