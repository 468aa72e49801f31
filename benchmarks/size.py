"""How small a sparse model's file becomes, by format.

    python benchmarks/size.py

ResNet-50 and BERT-base with random weights, of which the smallest magnitudes of all layers together, or of each layer,
are set to zero; biases and norms stay dense. Files of `save_sparse` are read back and compared.
"""

import argparse
import tempfile
import warnings
import zipfile
from pathlib import Path

import torch
import zstandard
from safetensors.torch import save_file
from tables import publish, table
from transformers import BertConfig, BertModel, ResNetConfig, ResNetForImageClassification

from lightning_sparse.export import load_sparse, save_sparse

MODELS = {
    "ResNet-50": lambda: ResNetForImageClassification(ResNetConfig(num_labels=1000)),
    "BERT-base": lambda: BertModel(BertConfig()),
}


@torch.no_grad()
def prune(model, sparsity, scope):
    weights = [p for p in model.parameters() if p.ndim > 1]
    groups = [weights] if scope == "global" else [[weight] for weight in weights]
    for group in groups:
        magnitudes = torch.cat([weight.abs().flatten() for weight in group])
        threshold = magnitudes.kthvalue(max(1, int(sparsity * len(magnitudes)))).values
        for weight in group:
            weight.masked_fill_(weight.abs() <= threshold, 0.0)
    return model


def dense(state, path):
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)


def half(state, path):
    dense({name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}, path)


def csr(state, path):
    """Columns and values of each row, and where rows begin; tensors that get larger by it stay dense."""
    stored = {}
    for name, tensor in state.items():
        if tensor.ndim < 2 or not tensor.is_floating_point() or 2 * int(tensor.count_nonzero()) >= tensor.numel():
            stored[name] = tensor
            continue
        matrix = tensor.flatten(1).to_sparse_csr()
        stored |= {
            name + ":rows": matrix.crow_indices().int(),
            name + ":columns": matrix.col_indices().int(),
            name + ":values": matrix.values(),
        }
    dense(stored, path)


def zipped(state, path):
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        file = Path(folder) / "model.safetensors"
        dense(state, file)
        archive.write(file)


def zstd(state, path):
    with tempfile.TemporaryDirectory() as folder, open(path, "wb") as out:
        file = Path(folder) / "file"
        dense(state, file)
        out.write(zstandard.ZstdCompressor(level=3).compress(file.read_bytes()))


def bitmask(state, path):
    save_sparse(state, path, compress=False)
    check(state, path)


def packed(state, path):
    save_sparse(state, path)
    check(state, path)


def packed_half(state, path):
    packed({name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}, path)


def check(state, path):
    found = load_sparse(path)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


FORMATS = {
    "half precision, dense": half,
    "zip (deflate)": zipped,
    "zstd alone": zstd,
    "CSR, int32 indices": csr,
    "bitmask: `save_sparse(compress=False)`": bitmask,
    "**`save_sparse`**": packed,
    "`save_sparse` in half precision": packed_half,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.8, 0.9, 0.95])
    parser.add_argument("--scopes", nargs="+", default=["uniform", "global"], choices=["uniform", "global"])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--output", help="file to write the tables to")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
    texts = []
    for name in options.models:
        columns, titles, size = [], [], 0
        for scope in options.scopes:
            for sparsity in options.sparsities:
                torch.manual_seed(0)
                state = prune(MODELS[name](), sparsity, scope).state_dict()
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / "file"
                    dense(state, path)
                    size, column = path.stat().st_size, []
                    for write in FORMATS.values():
                        write(state, path)
                        column.append(f"{size / path.stat().st_size:.2f}")
                columns.append(column)
                titles.append(f"{100 * sparsity:g} %, {scope}")
                print(name, titles[-1], column, flush=True)
        rows = zip(FORMATS, *columns, strict=True)
        texts.append(f"## {name}, {size / 1e6:.1f} MB\n\n{table(['format', *titles], rows)}")
    note = (
        "How many times smaller a file is than that of dense float32 in safetensors. Random weights; the smallest"
        " magnitudes are zero, in each tensor (uniform) or of all (global), of tensors with at least two dimensions, so"
        " of embeddings too. All but half precision keep every bit;"
        " files of `save_sparse` were read back and compared."
    )
    publish("Size of a sparse model's file", "\n\n".join([note, *texts]), options.output)


if __name__ == "__main__":
    main()
