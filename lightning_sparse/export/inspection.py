"""What anybody's checkpoint holds: how many zeros, and where."""

import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_sparse.export.packing import read_sparse
from lightning_sparse.functional import count_nonzeros
from lightning_sparse.reports import Report, Row

__all__ = ["inspect_checkpoint", "read_checkpoint"]

# Under which keys a file may hold the state dict.
_NESTS = ("state_dict", "model_state_dict", "model", "module")
# What pruning by `torch.nn.utils.prune`, or by a parametrization, makes of a name.
_ORIGINAL = re.compile(r"(?P<weight>.*)_orig|(?P<module>.*\.|)parametrizations\.(?P<leaf>\w+)\.original")


def inspect_checkpoint(path: str | Path) -> Report:
    """Count the zeros in a checkpoint, whoever has written it; nothing in it is run.

    Reads checkpoints of Lightning, state dicts saved by ``torch.save``, safetensors files, packed or not. Weights under
    a mask (``*_orig`` and ``*_mask``, or a parametrization) are counted as the network sees them. FLOPs are known where
    a strategy of this package has written the checkpoint.

    Args:
        path: The file.

    Returns:
        A row for each floating-point tensor. Treated are those that the strategy has treated, else all of at least two
        dimensions. Totals: ``"sparsity/total"`` of the treated ones, ``"sparsity/model"`` of all rows, and those of the
        FLOPs.

    Raises:
        ValueError: If the file is no such checkpoint or is damaged.
        FileNotFoundError: If there is no such file.

    Example:
        >>> path = getfixture("tmp_path") / "model.pt"
        >>> torch.save({"weight": torch.eye(2), "bias": torch.zeros(2)}, path)
        >>> inspect_checkpoint(path).totals
        {'sparsity/total': 0.5, 'sparsity/model': 0.6666666666666666}
    """
    path = Path(path)
    checkpoint = read_checkpoint(path)
    method, state = _strategy(checkpoint)
    treated, flops = state.get("latents"), _Flops(state.get("account", {}))
    rows = [
        Row(
            name,
            tuple(tensor.shape),
            treated=tensor.ndim > 1 if treated is None else name in treated,
            reason=str(tensor.dtype).removeprefix("torch."),
            zeros=tensor.numel() - int(count_nonzeros([tensor])),
            flops=flops.per_sample(name),
        )
        for name, tensor in _weights(checkpoint)
    ]
    if not rows:
        raise ValueError(f"Expected {path} to hold floating-point tensors, but got none.")
    return Report(method or path.name, rows, _totals(rows) | flops.totals(rows), flops.uncounted)


class _Flops:
    """What the account in a checkpoint tells."""

    def __init__(self, account: Mapping[str, Any]) -> None:
        self.by_layer, self.samples = account.get("by_layer", {}), account.get("samples", 1)
        self.rest, self.uncounted = account.get("rest", 0.0), account.get("uncounted", {})

    def per_sample(self, name: str) -> float | None:
        """Dense forward FLOPs due to a weight."""
        return self.by_layer[name] / self.samples if name in self.by_layer else None

    def totals(self, rows: list[Row]) -> dict[str, float]:
        """Inference FLOPs of the sparse model, and their ratio to the dense ones."""
        dense = sum(self.by_layer.values()) + self.rest
        saved = sum(self.by_layer.get(row.name, 0.0) * (row.sparsity or 0.0) for row in rows)
        if not dense:
            return {}
        return {"flops/inference": (dense - saved) / self.samples, "flops/inference_ratio": 1.0 - saved / dense}


def _totals(rows: list[Row]) -> dict[str, float]:
    def fraction(some: list[Row]) -> float:
        return sum(row.zeros or 0 for row in some) / max(1, sum(row.numel for row in some))

    return {"sparsity/total": fraction([row for row in rows if row.treated]), "sparsity/model": fraction(rows)}


def _strategy(checkpoint: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Name and state of the strategy that has treated most weights, if one of this package has."""
    callbacks = checkpoint.get("callbacks", {})
    ours = {key: state for key, state in callbacks.items() if isinstance(state, dict) and "latents" in state}
    key = max(ours, key=lambda key: len(ours[key]["latents"]), default="")
    return re.split(r"\W", key)[0], ours.get(key, {})


def _weights(checkpoint: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors as the network sees them."""
    nest = next((checkpoint[key] for key in _NESTS if isinstance(checkpoint.get(key), Mapping)), checkpoint)
    tensors = {name.replace("_orig_mod.", ""): value for name, value in nest.items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        original = _ORIGINAL.fullmatch(name)
        if original is None:
            is_mask = name.removesuffix("_mask") + "_orig" in tensors or re.search(r"parametrizations\..*\.mask$", name)
            if tensor.is_floating_point() and not is_mask:
                yield name, tensor
        elif original["weight"] is not None:
            yield original["weight"], tensor * tensors.get(original["weight"] + "_mask", 1)
        else:
            prefix = f"{original['module']}parametrizations.{original['leaf']}."
            for key in (key for key in tensors if key.startswith(prefix) and key.endswith(".mask")):
                tensor = tensor * tensors[key]
            yield original["module"] + original["leaf"], tensor


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """All that a file holds, without running anything."""
    if path.is_dir():
        raise ValueError(
            f"Expected {path} to be a file, but it is a folder. If it is a checkpoint in shards, make a file of it by"
            " `lightning_sparse.consolidate_checkpoint`."
        )
    with path.open("rb") as file:
        start = file.read(8)
    zipped = start[:2] == b"PK"
    if not zipped and (start[:2] != b"\x80\x02" or not any(start[2:])):  # not even what torch.save wrote long ago
        return dict(read_sparse(path))
    unknown: list[str] = []
    try:
        if zipped:
            unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(type("Inert", (_Inert,), {}), name) for name in unknown]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (AttributeError, EOFError, KeyError, RuntimeError, TypeError, ValueError, pickle.UnpicklingError) as error:
        why = str(error).partition("\n")[0]
        if isinstance(error, pickle.UnpicklingError):
            why = f"it asks for {', '.join(unknown) or 'more than tensors'}, which is not run"
        raise ValueError(f"Expected {path} to be a checkpoint, but it cannot be read: {why}.") from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"Expected {path} to hold a dict of tensors, but it holds an object. Save its `state_dict()`.")
    return checkpoint


class _Inert:
    """Stands for a class that is not needed, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass
