"""What the commands of the command line do. Their arguments are those of these functions, in the docstrings' words."""

import importlib
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

from lightning_sparse import cards, strategies
from lightning_sparse import export as exports
from lightning_sparse.export.inspection import read_checkpoint
from lightning_sparse.reports import write_report

__all__ = ["COMMANDS", "methods"]

# By the ending of the file.
_FORMATS: dict[str, Callable[..., object]] = {
    ".onnx": exports.to_onnx,
    ".pt": exports.to_state_dict,
    ".pt2": exports.to_program,
    ".safetensors": exports.to_safetensors,
    ".xml": exports.to_openvino,
}
_PROGRAMS = (".onnx", ".pt2", ".xml")  # in which the network is, too


def methods(name: str | None, fill: Sequence[Path]) -> None:
    """List the methods, one per line, or show all about one."""
    known = {method: vars(strategies)[method] for method in strategies.__all__}
    if name is not None and name not in known:
        raise ValueError(f"Expected argument `NAME` to be one of {', '.join(known)}, but got {name!r}.")
    for path in fill:
        try:
            text = cards.fill(path.read_text("utf-8"), cards.parts(known.values()))
        except ValueError as error:
            raise ValueError(f"`{path}`: {error}") from error
        path.write_text(text, "utf-8")
    if name is not None:
        print(cards.sheet(known[name]))
    elif not fill:
        print("\n".join(cards.line(method, max(map(len, known))) for method in known.values()))


def inspect(checkpoint: Path) -> None:
    """Count the zeros in anybody's checkpoint; nothing in it is run.

    Args:
        checkpoint: Of Lightning, a state dict of torch.save, or safetensors, packed or not.
    """
    print(exports.inspect_checkpoint(checkpoint))


def report(
    run: Path, *, against: Path | None = None, output: Path = Path("report.html"), pictures: Path | None = None
) -> None:
    """Show a recorded run on one page with interactive charts, which needs no network.

    Args:
        run: What RunRecorder has written.
        against: Another run to compare with.
        output: The page.
        pictures: Folder for the same charts as PNG files.
    """
    runs = [run] if against is None else [run, against]
    print(write_report(runs, output, pictures=pictures))


def export(
    checkpoint: Path, model: str, output: Path, *, input_shape: list[int] | None = None, dynamic_batch: bool = False
) -> None:
    """Write a trained model for another program, and check the file there.

    Args:
        checkpoint: Of Lightning, a state dict of torch.save, or safetensors, packed or not.
        model: Class of the model, such as my_package.Model.
        output: The file. Its ending says which program it is for: .onnx, .xml (OpenVINO), .pt2 (torch.export),
            .safetensors, .pt (state dict), or .zst (packed, the smallest).
        input_shape: Shape of the input, such as [1,3,32,32]; by default that of the model's example_input_array.
        dynamic_batch: Whether the batch may have any size, in .onnx, .xml and .pt2.
    """
    if output.suffix == ".zst":
        print(f"{output}: {exports.save_sparse(_load(model, checkpoint), output):,} bytes")
        return
    _hand_over(*_prepare(checkpoint, model, input_shape), output, _FORMATS, dynamic_batch)


def explain(checkpoint: Path, model: str, *, input_shape: list[int] | None = None) -> None:
    """Tell for each layer and each runtime whether it will run faster, and by which rule.

    Args:
        checkpoint: Of Lightning, a state dict of torch.save, or safetensors, packed or not.
        model: Class of the model, such as my_package.Model.
        input_shape: Shape of the input, such as [1,3,32,32]; by default that of the model's example_input_array.
    """
    print(exports.explain(*_prepare(checkpoint, model, input_shape)))


def accelerate(
    checkpoint: Path, model: str, *, output: Path | None = None, input_shape: list[int] | None = None
) -> None:
    """Use sparse kernels in the layers where they are measured to be faster on this machine.

    Args:
        checkpoint: Of Lightning, a state dict of torch.save, or safetensors, packed or not.
        model: Class of the model, such as my_package.Model.
        output: File for the accelerated model, for torch.load(..., weights_only=False); by default it is only measured.
        input_shape: Shape of the input, such as [1,3,32,32]; by default that of the model's example_input_array.
    """
    accelerated = exports.accelerate(*_prepare(checkpoint, model, input_shape))
    print(accelerated.acceleration)
    if output is not None:
        torch.save(accelerated, output)


def slim(
    checkpoint: Path,
    model: str,
    *,
    output: Path | None = None,
    input_shape: list[int] | None = None,
    multiple_of: int = 1,
    dynamic_batch: bool = False,
) -> None:
    """Remove the channels that are entirely zero, so that any engine runs the smaller network.

    Args:
        checkpoint: Of Lightning, a state dict of torch.save, or safetensors, packed or not.
        model: Class of the model, such as my_package.Model.
        output: File for the smaller network, .onnx, .xml (OpenVINO) or .pt2 (torch.export); by default none.
        input_shape: Shape of the input, such as [1,3,32,32]; by default that of the model's example_input_array.
        multiple_of: What the number of channels that are left is to be a multiple of.
        dynamic_batch: Whether the batch may have any size in the file.
    """
    trained, inputs = _prepare(checkpoint, model, input_shape)
    slimmed = exports.slim(trained, inputs, multiple_of=multiple_of)
    print(slimmed.slimming)
    if output is not None:
        _hand_over(slimmed, inputs, output, {suffix: _FORMATS[suffix] for suffix in _PROGRAMS}, dynamic_batch)


# In the order of the help.
COMMANDS: dict[str, Callable[..., None]] = {
    "methods": methods,
    "inspect": inspect,
    "report": report,
    "export": export,
    "explain": explain,
    "accelerate": accelerate,
    "slim": slim,
}


def _hand_over(
    model: nn.Module, inputs: Any, path: Path, formats: dict[str, Callable[..., object]], dynamic_batch: bool
) -> None:
    if path.suffix not in formats:
        raise ValueError(f"Expected argument `output` to end in one of {', '.join(formats)}, but got {str(path)!r}.")
    options = {"dynamic_batch": dynamic_batch} if path.suffix in _PROGRAMS else {}
    print(formats[path.suffix](model, inputs, path, **options))


def _prepare(checkpoint: Path, model: str, input_shape: list[int] | None) -> tuple[nn.Module, Any]:
    """The trained model, and what to call it with."""
    trained = _load(model, checkpoint)
    if input_shape is not None:
        return trained, torch.randn(input_shape, generator=torch.Generator().manual_seed(0))
    example = getattr(trained, "example_input_array", None)
    if example is None:
        raise ValueError(f"Expected argument `input_shape`, as `{model}` has no `example_input_array`, but got none.")
    return trained, example


def _load(name: str, checkpoint: Path) -> nn.Module:
    """A model of a class, with what a checkpoint holds; nothing but tensors and numbers is read from the file."""
    module, _, attribute = name.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module or name), attribute)
    except (AttributeError, ModuleNotFoundError) as error:
        raise ValueError(f"Expected argument `model` to be a class like my_package.Model, but got {name!r}.") from error
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ValueError(f"Expected argument `model` to name a class of modules, but {name!r} is none.")
    held = read_checkpoint(checkpoint)
    try:
        if issubclass(cls, L.LightningModule) and "pytorch-lightning_version" in held:
            return cls.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True).eval()
        model: nn.Module = cls()
        model.load_state_dict(held.get("state_dict", held))
    except (RuntimeError, TypeError, pickle.UnpicklingError) as error:
        raise ValueError(f"Expected {checkpoint} to fit the model `{name}`, but it does not: {error}") from error
    return model.eval()
