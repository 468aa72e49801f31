"""Files for other programs, each read back by the program that it is for before it counts as written."""

import contextlib
import copy
import dataclasses
import hashlib
import importlib
import inspect
import io
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import starmap
from pathlib import Path
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from lightning_sparse.export.calls import arguments, copy_model, largest_difference, outputs, rounding
from lightning_sparse.functional import count_nonzeros

__all__ = ["Handover", "flush_subnormals", "to_onnx", "to_openvino", "to_program", "to_safetensors", "to_state_dict"]

_LARGEST_ONNX = 2**31 - 2**20


@dataclass(frozen=True)
class Handover:
    """A file that was written, read back and run. Prints as a line.

    Attributes:
        path: The file.
        bytes: Its size, with that of files that belong to it.
        difference: The largest difference between its outputs and the model's, in units of the largest output.
        zeros: In the weights of the model: zeros among numbers of tensors with at least two dimensions.
        zeros_in_file: In those of the file; more where the exporter has added constants.
        subnormals: How many numbers were flushed to zero.
    """

    path: Path
    bytes: int
    difference: float
    zeros: int
    zeros_in_file: int
    subnormals: int

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers and strings."""
        return dataclasses.asdict(self) | {"path": str(self.path)}

    def __str__(self) -> str:
        """What to know of it."""
        return (
            f"{self.path}: {self.bytes:,} bytes, outputs differ by {self.difference:.1e} of the largest,"
            f" {self.zeros_in_file:,} zeros of {self.zeros:,}, {self.subnormals:,} subnormal numbers flushed"
        )


@overload
def flush_subnormals(held: Tensor) -> Tensor: ...
@overload
def flush_subnormals(held: nn.Module) -> nn.Module: ...
@overload
def flush_subnormals(held: Mapping[str, Tensor]) -> dict[str, Tensor]: ...
def flush_subnormals(held: Tensor | nn.Module | Mapping[str, Tensor]) -> Tensor | nn.Module | dict[str, Tensor]:
    """Set numbers to zero that are too small for full precision, with which some processors calculate slowly.

    Args:
        held: A tensor, a state dict or a model; it is not changed.

    Returns:
        The same with zeros for the subnormal numbers of its type, a copy. Names of one tensor stay names of one tensor.

    Example:
        >>> flush_subnormals(torch.tensor([1.0, -1e-40, 1e-38]))
        tensor([1., 0., 0.])
        >>> flush_subnormals(torch.tensor([1.0, 2e-38])).ne(0)
        tensor([True, True])
    """
    if isinstance(held, Tensor):
        return _flush(held)
    if isinstance(held, nn.Module):
        model = copy_model(held)
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.is_floating_point():
                    tensor.copy_(_flush(tensor))
        return model
    made: dict[Any, Tensor] = {}
    places = {name: (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) for name, tensor in held.items()}
    return {name: made.setdefault(places[name], _flush(tensor)) for name, tensor in held.items()}


def _flush(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.detach().clone()
    tensor = tensor.detach()
    return tensor.masked_fill(tensor.abs() < torch.finfo(tensor.dtype).tiny, 0.0)


def to_safetensors(model: nn.Module, example_inputs: Any, path: str | Path) -> Handover:
    """Write the weights as a safetensors file, for whoever has the model's class; see :func:`to_onnx`.

    Raises:
        ModuleNotFoundError: If the package safetensors is missing.
        ValueError: If the model with the weights of the file gives other outputs.
    """
    library = _require("safetensors.torch", "safetensors")
    job = _Job(model, example_inputs, path)

    def open_file(part: Path) -> _Opened:
        loaded = _emptied(job.model)
        library.load_model(loaded, str(part))
        return _Opened(partial(outputs, loaded), loaded.parameters())

    return job.finish(lambda part: library.save_model(job.model, str(part)), open_file)


def to_state_dict(model: nn.Module, example_inputs: Any, path: str | Path) -> Handover:
    """Write the weights by ``torch.save``, for whoever has the model's class; see :func:`to_onnx`.

    Raises:
        ValueError: If the model with the weights of the file gives other outputs.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([[1.0, 0.0], [1e-40, 0.0]]))
        >>> handover = to_state_dict(model, torch.ones(1, 2), getfixture("tmp_path") / "model.pt")
        >>> handover.zeros, handover.subnormals, handover.difference
        (3, 1, 0.0)
    """
    job = _Job(model, example_inputs, path)

    def open_file(part: Path) -> _Opened:
        loaded = _emptied(job.model)
        loaded.load_state_dict(torch.load(part, map_location="cpu", weights_only=True))
        return _Opened(partial(outputs, loaded), loaded.parameters())

    return job.finish(lambda part: torch.save(job.model.state_dict(), part), open_file)


def to_program(model: nn.Module, example_inputs: Any, path: str | Path, *, dynamic_batch: bool = False) -> Handover:
    """Write the program of ``torch.export``, which runs without the model's class, by custom ``*.pt2``.

    Arguments, errors and what it returns are those of :func:`to_onnx`; no package is needed.
    """
    job = _Job(model, example_inputs, path, dynamic_batch)

    def open_file(part: Path) -> _Opened:
        program = torch.export.load(part)
        return _Opened(partial(outputs, program.module()), program.state_dict.values())

    return job.finish(lambda part: torch.export.save(job.program(), part), open_file)


def to_onnx(model: nn.Module, example_inputs: Any, path: str | Path, *, dynamic_batch: bool = False) -> Handover:
    """Write an ONNX file, run it in ONNX Runtime and compare.

    Subnormal numbers among the weights become zeros first, for some processors calculate slowly with them. The file
    gets its name only after it was read back, gave the outputs of the model and held all of its zeros.

    Args:
        model: The model; it is not changed. It is written in evaluation mode.
        example_inputs: What it is called with: a tensor, a tuple of arguments or a dict of keyword arguments.
        path: File to write.
        dynamic_batch: Whether the first dimension of all tensors is a batch of any size; two sizes are tried. Else the
            file takes inputs of the example's shapes only.

    Returns:
        What was written and how far outputs differ.

    Raises:
        ModuleNotFoundError: If the packages of the extra ``onnx`` are missing.
        ValueError: If the model cannot be written or what was written not be run, if outputs differ beyond rounding,
            or if zeros were lost. There is no new file then; an old one of that name is left.
    """
    onnx, runtime = _require("onnx", "lightning-sparse[onnx]"), _require("onnxruntime", "lightning-sparse[onnx]")
    _require("onnxscript", "lightning-sparse[onnx]")
    job = _Job(model, example_inputs, path, dynamic_batch)
    if sum(tensor.nbytes for tensor in job.model.state_dict().values()) >= _LARGEST_ONNX:
        raise ValueError("Expected a model of less than 2 GB, which is what one ONNX file can hold. Use `to_program`.")

    def write(part: Path) -> None:
        torch.onnx.export(job.program(), (), str(part), dynamo=True, external_data=False, verbose=False)

    def open_file(part: Path) -> _Opened:
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        session = runtime.InferenceSession(str(part), options, providers=["CPUExecutionProvider"])

        def run(args: Any, kwargs: Any) -> list[Tensor]:
            names = [value.name for value in session.get_inputs()]
            feed = zip(names, map(_numpy, _tensors(args, kwargs)), strict=True)
            return [torch.as_tensor(found) for found in session.run(None, dict(feed))]

        held = onnx.load(str(part)).graph.initializer
        return _Opened(run, (_tensor(onnx.numpy_helper.to_array(tensor)) for tensor in held))

    return job.finish(write, open_file)


def to_openvino(model: nn.Module, example_inputs: Any, path: str | Path, *, dynamic_batch: bool = False) -> Handover:
    """Write OpenVINO's ``*.xml`` and the ``*.bin`` beside it, run them on the CPU in float32 and compare.

    Arguments, errors and what it returns are those of :func:`to_onnx`, the extra is ``openvino``.
    """
    openvino = _require("openvino", "lightning-sparse[openvino]")
    if Path(path).suffix != ".xml":
        raise ValueError(f"Expected argument `path` to end with .xml, but got {str(path)!r}.")
    job = _Job(model, example_inputs, path, dynamic_batch)

    def write(part: Path) -> None:
        openvino.save_model(openvino.convert_model(job.program()), str(part), compress_to_fp16=False)

    def open_file(part: Path) -> _Opened:
        read = openvino.Core().read_model(str(part))
        compiled = openvino.Core().compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

        def run(args: Any, kwargs: Any) -> list[Tensor]:
            found = compiled([_numpy(tensor) for tensor in _tensors(args, kwargs)])
            return [torch.as_tensor(found[port]) for port in compiled.outputs]

        held = (op for op in read.get_ops() if op.get_type_name() == "Constant" and op.get_element_type().is_real())
        return _Opened(run, (_tensor(op.get_data()) for op in held))

    return job.finish(write, open_file)


class _Opened(NamedTuple):
    """A file as another program sees it."""

    run: Callable[[tuple[Any, ...], dict[str, Any]], list[Tensor]]
    weights: Iterable[Tensor]


class _Job:
    """Writes a file beside its place, checks it, and puts it there."""

    def __init__(self, model: nn.Module, example_inputs: Any, path: str | Path, dynamic_batch: bool = False) -> None:
        self.path = Path(path)
        self.model = flush_subnormals(model).eval().requires_grad_(False)
        self.examples, self.dynamic = [arguments(example_inputs)], dynamic_batch
        if dynamic_batch:  # written with the larger one, for torch takes a batch of one for a number of its own kind
            self.examples.insert(0, tree_map_only(Tensor, _twice, self.examples[0]))
        held = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
        self.subnormals = sum(_nonzeros([tensor]) - _nonzeros([_flush(tensor)]) for tensor in held)

    def program(self) -> torch.export.ExportedProgram:
        """The model as torch writes it down."""
        args, kwargs = self.examples[0]
        shapes = tree_map(_any_batch, (args, kwargs)) if self.dynamic else None
        names = list(inspect.signature(self.model.forward).parameters)
        if shapes is not None:
            shapes = dict(zip(names, shapes[0], strict=False)) | shapes[1]
        return torch.export.export(self.model, args, kwargs, dynamic_shapes=shapes)

    def finish(self, write: Callable[[Path], object], open_file: Callable[[Path], _Opened]) -> Handover:
        """Write by one function and open what was written by the other."""
        with tempfile.TemporaryDirectory(dir=self.path.parent, prefix=f".{self.path.name}.") as folder:
            part = Path(folder) / self.path.name
            try:
                with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                    warnings.simplefilter("ignore")
                    write(part)
                    opened = open_file(part)
                    pairs = [(outputs(self.model, *given), opened.run(*given)) for given in self.examples]
                    found = _zeros(opened.weights)
            except Exception as error:  # of which each exporter and runtime has kinds of its own
                raise ValueError(
                    f"Expected a model that can be written to {self.path.name} and run from there, but got: {error}"
                ) from error
            zeros, difference = _zeros(self.model.parameters()), max(starmap(largest_difference, pairs))
            self._check(difference, rounding(self.model, pairs[0][0]), zeros, found)
            files = list(Path(folder).iterdir())
            size = sum(file.stat().st_size for file in files)
            for file in files:
                file.replace(self.path.with_name(file.name))
        return Handover(self.path, size, difference, zeros, found, self.subnormals)

    def _check(self, difference: float, limit: float, zeros: int, found: int) -> None:
        if not difference <= limit:
            raise ValueError(
                f"Expected {self.path.name} to give the outputs of the model, but they differ by {difference:.1e} of"
                f" the largest one, where {limit:.1e} would be rounding. It was not kept."
            )
        if found < zeros:
            raise ValueError(
                f"Expected {self.path.name} to hold the {zeros:,} zeros of the model, but got {found:,}. It was not"
                " kept."
            )


def _emptied(model: nn.Module) -> nn.Module:
    """A copy that gives nothing but NaN until weights are loaded."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan if parameter.is_floating_point() else 0)
    return model


def _zeros(tensors: Iterable[Tensor]) -> int:
    """Zeros in weights. Equal tensors count once, for some exporters write them once."""
    seen, zeros = set(), 0
    for tensor in tensors:
        if tensor.ndim > 1 and tensor.is_floating_point():
            flat = tensor.detach().cpu().contiguous().flatten()
            digest = hashlib.blake2b(flat.view(torch.uint8).numpy().data, digest_size=16).digest()
            zeros += 0 if digest in seen else flat.numel() - _nonzeros([flat])
            seen.add(digest)
    return zeros


def _nonzeros(tensors: list[Tensor]) -> int:
    return int(count_nonzeros(tensors))


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]


def _numpy(tensor: Tensor) -> Any:
    return tensor.detach().cpu().numpy()


def _tensor(array: Any) -> Tensor:
    """A copy, in float32 if numpy itself does not know the type."""
    known = array.dtype.kind in "biufc"
    return torch.from_numpy(array.copy() if known else array.astype("float32"))


def _twice(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor]) if tensor.ndim else tensor


def _any_batch(value: Any) -> Any:
    return {0: torch.export.Dim.AUTO} if isinstance(value, Tensor) and value.ndim else None


def _require(package: str, what: str) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"This file format needs a package: pip install '{what}'") from error
