"""Layers that hold their weight as CSR with 32-bit indices, for inference on a CPU.

PyTorch's own indices have 64 bits: twice as much to read, and slower kernels. ``torch.compile`` knows no sparse
tensors; hence the product is an operator of its own, ``lightning_sparse::csr_matmul``.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CSRConv2d", "CSRLinear", "DTYPES"]

DTYPES = (torch.float32, torch.float64)  # of which MKL multiplies sparse matrices

torch.library.define(
    "lightning_sparse::csr_matmul",
    "(Tensor crow, Tensor col, Tensor values, SymInt width, Tensor? bias, Tensor columns) -> Tensor",
)


@torch.library.impl("lightning_sparse::csr_matmul", "cpu")
def _csr_matmul(crow: Tensor, col: Tensor, values: Tensor, width: int, bias: Tensor | None, columns: Tensor) -> Tensor:
    weight = torch.sparse_csr_tensor(crow, col, values, (len(crow) - 1, width), check_invariants=False)
    if columns.shape[1] == 1:  # a matrix times a vector is a faster kernel
        vector = columns[:, 0]
        return (torch.mv(weight, vector) if bias is None else torch.addmv(bias, weight, vector))[:, None]
    return torch.mm(weight, columns) if bias is None else torch.addmm(bias[:, None], weight, columns)


def _csr_matmul_fake(
    crow: Tensor, col: Tensor, values: Tensor, width: int, bias: Tensor | None, columns: Tensor
) -> Tensor:
    return values.new_empty(crow.shape[0] - 1, columns.shape[1])


torch.library.register_fake("lightning_sparse::csr_matmul", _csr_matmul_fake)


with warnings.catch_warnings():  # "Sparse CSR tensor support is in beta", once per process
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(torch.zeros(1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), [], (0, 1))


class _CSRLayer(nn.Module):
    """A layer that is a product of a sparse matrix and the columns of its input.

    Its state dict is that of the dense layer: it holds the ``weight``, and loads any other.
    """

    crow: Tensor
    col: Tensor
    values: Tensor

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.shape, self.bias, self.training = layer.weight.shape, layer.bias, False
        for name in ("crow", "col", "values"):
            self.register_buffer(name, None, persistent=False)
        self._take(layer.weight)

    @property
    def weight(self) -> Tensor:
        """The dense weight, made anew for whoever looks at it."""
        size = (self.shape[0], self.shape[1:].numel())
        return torch.sparse_csr_tensor(self.crow, self.col, self.values, size).to_dense().view(self.shape)

    def train(self, mode: bool = True) -> "_CSRLayer":
        """Refuse to train."""
        if mode:
            raise RuntimeError("Expected an accelerated model to stay in evaluation mode. Train the one it is made of.")
        return super().train(mode)

    def extra_repr(self) -> str:
        """What `print` shows."""
        sparsity = 1 - self.values.numel() / max(1, self.shape.numel())
        return f"shape={tuple(self.shape)}, sparsity={sparsity:.3f}, bias={self.bias is not None}"

    def _take(self, weight: Tensor) -> None:
        matrix = weight.detach().flatten(1).to_sparse_csr()
        self.crow, self.col = matrix.crow_indices().int(), matrix.col_indices().int()
        self.values = matrix.values().clone()  # no view of a sparse tensor, which `torch.compile` would refuse

    def _times(self, columns: Tensor) -> Tensor:
        """Multiply the weight by columns, shape ``(width, count)``, and add the bias."""
        if self.values.dtype not in DTYPES or not (self.values.is_cpu and columns.is_cpu):
            found = f"{str(self.values.dtype).removeprefix('torch.')} on {self.values.device}"
            raise RuntimeError(
                f"Expected an accelerated layer to stay float32 or float64 on the CPU, but got {found}."
                " Convert the dense model, and accelerate it then."
            )
        if columns.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("Expected inputs that require no gradient, for accelerated layers have none.")
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return self._multiply(columns.to(self.values.dtype))
        return self._multiply(columns)

    def _multiply(self, columns: Tensor) -> Tensor:
        result: Tensor = torch.ops.lightning_sparse.csr_matmul(
            self.crow, self.col, self.values, self.shape[1:].numel(), self.bias, columns
        )
        return result

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name = prefix + "weight"
        rest = {key: value for key, value in state_dict.items() if key != name}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if name not in state_dict:
            missing_keys.append(name)
        elif state_dict[name].shape != self.shape:
            expected, found = tuple(self.shape), tuple(state_dict[name].shape)
            error_msgs.append(f"size mismatch for {name}: expected {expected}, but got {found}.")
        else:
            self._take(state_dict[name].to(self.values))


class CSRLinear(_CSRLayer):
    """An ``nn.Linear`` whose zeros cost nothing."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, input: Tensor) -> Tensor:
        """Multiply, whatever the number of rows."""
        rows = input.flatten(0, -2) if input.ndim > 1 else input[None]
        return self._times(rows.t()).t().contiguous().view(*input.shape[:-1], self.out_features)


class CSRConv2d(_CSRLayer):
    """An ``nn.Conv2d`` without groups as a matrix times the patches of the images."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__(layer)
        self.kernel_size, self.dilation, self.stride = layer.kernel_size, layer.dilation, layer.stride
        self.padding = tuple(int(size) for size in layer.padding)
        sizes = zip(self.kernel_size, self.stride, self.padding, strict=True)
        self._pixels = all(size == (1, 1, 0) for size in sizes)  # then a patch is a pixel, and the image holds them all

    def forward(self, input: Tensor) -> Tensor:
        """Multiply the patches of all images at once."""
        images = input if input.ndim == 4 else input[None]
        geometry = (self.kernel_size, self.dilation, self.padding, self.stride)
        patches = images.flatten(2) if self._pixels else F.unfold(images, *geometry)
        ends = zip(images.shape[2:], self.kernel_size, self.dilation, self.padding, strict=True)
        spans = (length - dilation * (kernel - 1) + 2 * padding for length, kernel, dilation, padding in ends)
        size = [(span - 1) // step + 1 for span, step in zip(spans, self.stride, strict=True)]
        product = self._times(patches.transpose(0, 1).flatten(1)).view(self.shape[0], len(images), *size)
        return product.transpose(0, 1).contiguous().view(*input.shape[:-3], self.shape[0], *size)
