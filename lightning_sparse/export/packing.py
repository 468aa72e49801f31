"""A file as small as the weights that are left: one bit a weight, and the values of those that are not zero.

The file is a safetensors file, compressed by Zstandard. A tensor is held as it is under its own name, or as two:
``NAME:mask`` (uint8, eight weights a byte, the first in the highest bit) and ``NAME:values`` (uint8, shape
``(bytes per number, count)``: the first bytes of all numbers that are not zero, then the second bytes, ...).
"""

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["load_sparse", "read_sparse", "save_sparse"]

# Names of types in safetensors.
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MASK, _VALUES = ":mask", ":values"
_ZSTD = b"\x28\xb5\x2f\xfd"
# As in the safetensors library: a header longer than this is not believed.
_LONGEST_HEADER = 100_000_000
_PIECE = 1 << 22


_Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]


class _Entry(NamedTuple):
    """What the header says of one tensor in the file."""

    name: str
    dtype: str
    shape: list[int]
    size: int


def save_sparse(model: nn.Module | Mapping[str, Tensor], path: str | Path, *, compress: bool = True) -> int:
    """Write a model as one bit a weight and the values that are not zero, bit for bit.

    A tensor for which that is no smaller is written as it is, a tensor that has several names once. Tensors are read
    one at a time, twice: a mapping may load each when it is asked for.

    Args:
        model: The module, or its state dict; tensors of any shape and type.
        path: File to write, by custom ``*.safetensors.zst``, or ``*.safetensors`` if not compressed.
        compress: Whether to compress the file by Zstandard; it is left as it is if that makes it no smaller.

    Returns:
        Size of the file in bytes.

    Raises:
        ModuleNotFoundError: If ``compress`` and the package zstandard is missing.
        ValueError: If a tensor has a type that safetensors does not know, or a name ends with ``:mask`` or ``:values``.

    Note:
        -0.0, which ``weight * mask`` leaves where a negative weight was, has a bit that is not zero, and is kept.

    Example:
        >>> layer = nn.Linear(1000, 100)
        >>> with torch.no_grad():
        ...     _ = layer.weight.masked_fill_(torch.rand_like(layer.weight) < 0.9, 0.0)
        >>> path = getfixture("tmp_path") / "layer.safetensors.zst"
        >>> 4 * 100_000 / save_sparse(layer, path) > 8  # times smaller than float32
        True
        >>> torch.equal(load_sparse(path)["weight"], layer.weight)
        True
    """
    tensors = model.state_dict() if isinstance(model, nn.Module) else model
    path, aliases = Path(path), _aliases(tensors)
    own = [name for name in tensors if name not in aliases]
    entries, sparse = [], {}
    for name in own:
        tensor = tensors[name]
        if name.endswith((_MASK, _VALUES)) or name == "__metadata__":
            raise ValueError(
                f"Expected names that do not end with {_MASK!r} or {_VALUES!r}, but got {name!r}. Rename it."
            )
        if tensor.dtype not in _NAMES:
            raise ValueError(f"Expected `{name}` to have a type of {list(_NAMES)}, but got {tensor.dtype}. Convert it.")
        entries += _plan(name, tensor)
        if len(entries) > 1 and entries[-1].name == name + _VALUES:
            sparse[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape)}
    metadata = {"format": "pt", "sparse": json.dumps(sparse), "aliases": json.dumps(aliases)}
    head = _header(entries, metadata)
    parts = path.with_name(path.name + ".part")
    try:
        with parts.open("wb") as file, _compressor(file, compress) as out:
            out.write(head)
            for name in own:
                for piece in _pieces(tensors[name], packed=name in sparse):
                    out.write(piece)
        plain = len(head) + sum(entry.size for entry in entries)
        if compress and parts.stat().st_size >= plain:
            return save_sparse(model, path, compress=False)
        parts.replace(path)
    finally:
        parts.unlink(missing_ok=True)
    return path.stat().st_size


def load_sparse(path: str | Path, model: nn.Module | None = None) -> dict[str, Tensor]:
    """Read what :func:`save_sparse` has written, or any safetensors file.

    Args:
        path: The file.
        model: Into which to load, tensor by tensor, if it is given; its names, shapes and types must be those of the
            file.

    Returns:
        The state dict; that of the model, if one is given.

    Raises:
        ValueError: If the file is no such file, is damaged, or does not fit the model.
        ModuleNotFoundError: If the file is compressed and the package zstandard is missing.
    """
    if model is None:
        return dict(read_sparse(path))
    state, seen = model.state_dict(), set()
    for name, tensor in read_sparse(path):
        if name not in state:
            raise ValueError(f"Expected {path} to hold tensors of the model, but `{name}` is none of them.")
        if (tensor.shape, tensor.dtype) != (state[name].shape, state[name].dtype):
            expected, found = (f"{tuple(t.shape)} {t.dtype}" for t in (state[name], tensor))
            raise ValueError(f"Expected `{name}` in {path} to be {expected} as in the model, but got {found}.")
        state[name].copy_(tensor)
        seen.add(name)
    if missing := [name for name in state if name not in seen]:
        raise ValueError(f"Expected {path} to hold all tensors of the model, but got none of {missing[:6]}.")
    model.load_state_dict(state)  # for modules whose state dict is made of what they hold, such as accelerated ones
    return state


def read_sparse(path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Read the tensors of a file of :func:`save_sparse`, or of any safetensors file, so that only one is in memory.

    Args:
        path: The file.

    Yields:
        Name and tensor; of a tensor with several names all of them, with the same tensor.

    Raises:
        ValueError: If the file is no such file or is damaged.
    """
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(len(_ZSTD))
        file.seek(0)
        source = _decompressor(file) if start == _ZSTD else file
        try:
            yield from _tensors(source)
        except _DamageError as error:
            raise ValueError(f"Expected {path} to be a safetensors file, packed or not, but {error}.") from error


class _DamageError(Exception):
    """The file is not what it should be."""


# -- writing ----------------------------------------------------------------------------------------------------------


def _aliases(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The name under which a tensor is written, by its other names."""
    if not isinstance(tensors, dict):  # each is loaded anew, perhaps to where another one was
        return {}
    first: dict[tuple[Any, ...], str] = {}
    places = {name: (t.device, t.data_ptr(), t.dtype, t.shape, t.stride()) for name, t in tensors.items() if t.numel()}
    return {name: first[place] for name, place in places.items() if first.setdefault(place, name) != name}


def _plan(name: str, tensor: Tensor) -> list[_Entry]:
    """How a tensor lies in the file: as it is or, if that is smaller, as mask and values."""
    size, width = tensor.numel() * tensor.element_size(), tensor.element_size()
    count, bits = int(_bits(tensor).any(1).sum()) if tensor.numel() else 0, math.ceil(tensor.numel() / 8)
    if bits + count * width >= size:
        return [_Entry(name, _NAMES[tensor.dtype], list(tensor.shape), size)]
    return [
        _Entry(name + _MASK, "U8", [bits], bits),
        _Entry(name + _VALUES, "U8", [width, count], width * count),
    ]


def _bits(tensor: Tensor) -> _Bytes:
    """Bytes of all numbers, shape ``(numbers, bytes per number)``; -0.0 is not zero here."""
    flat = tensor.detach().cpu().contiguous().flatten()
    bits: _Bytes = flat.view(torch.uint8).view(-1, tensor.element_size()).numpy()
    return bits


def _pieces(tensor: Tensor, *, packed: bool) -> Iterator[bytes]:
    bits = _bits(tensor)
    if not packed:
        yield bits.tobytes()
        return
    kept = bits.any(1)
    yield np.packbits(kept).tobytes()
    yield bits[kept].T.tobytes()


def _header(entries: Iterable[_Entry], metadata: dict[str, str]) -> bytes:
    table: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for entry in entries:
        table[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [end, end + entry.size]}
        end += entry.size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _compressor(file: BinaryIO, compress: bool) -> Any:
    if not compress:
        return nullcontext(file)
    return _zstandard().ZstdCompressor(level=3).stream_writer(file, closefd=False)


def _decompressor(file: BinaryIO) -> Any:
    return _zstandard().ZstdDecompressor().stream_reader(file)


# -- reading ----------------------------------------------------------------------------------------------------------


def _tensors(source: Any) -> Iterator[tuple[str, Tensor]]:
    entries, sparse, aliases = _parse(source)
    while entries:
        entry = entries.pop(0)
        bits = _read(source, entry.size)
        name, dtype, shape = entry.name, entry.dtype, entry.shape
        if name.endswith(_MASK):
            name = name.removesuffix(_MASK)
            if name not in sparse or not entries or entries[0].name != name + _VALUES:
                raise _DamageError(f"the mask of `{name}` has no values")
            dtype, shape = sparse[name]
            bits = _unpack(name, bits, _read(source, entries.pop(0).size), _DTYPES[dtype].itemsize, math.prod(shape))
        tensor = torch.from_numpy(bits).view(_DTYPES[dtype]).reshape(shape)
        yield name, tensor
        yield from ((alias, tensor) for alias, first in aliases.items() if first == name)
    if source.read(1):
        raise _DamageError("something follows the last tensor")


def _unpack(name: str, mask: _Bytes, values: _Bytes, width: int, count: int) -> _Bytes:
    if len(mask) != math.ceil(count / 8):
        raise _DamageError(f"the mask of `{name}` has {len(mask)} bytes for {count} numbers")
    kept = np.unpackbits(mask, count=count).astype(bool)
    if len(values) != width * kept.sum():
        raise _DamageError(f"`{name}` has {len(values)} bytes of values for {kept.sum()} numbers")
    bits = np.zeros((count, width), np.uint8)
    bits[kept] = values.reshape(width, -1).T
    return bits.reshape(-1)


def _parse(source: Any) -> tuple[list[_Entry], dict[str, tuple[str, list[int]]], dict[str, str]]:
    """The header: entries in the order of the file, types and shapes of packed tensors, further names."""
    (length,) = struct.unpack("<Q", _read(source, 8).tobytes())
    if length > _LONGEST_HEADER:
        raise _DamageError(f"its header would have {length} bytes")
    try:
        table = json.loads(_read(source, length).tobytes())
        metadata = table.pop("__metadata__", {})
        packed, aliases = (json.loads(metadata.get(key, "{}")) for key in ("sparse", "aliases"))
        sparse = {name: (form["dtype"], _shape(form["shape"])) for name, form in packed.items()}
        spans = [(tuple(_shape(form["data_offsets"])), name) for name, form in table.items()]
        spans.sort(key=lambda span: span[0])  # stable: empty tensors stay where they are
        entries = [_Entry(name, table[name]["dtype"], _shape(table[name]["shape"]), b - a) for (a, b), name in spans]
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise _DamageError(f"its header cannot be read ({type(error).__name__}: {error})") from error
    if unknown := {*(dtype for dtype, _ in sparse.values()), *(entry.dtype for entry in entries)} - set(_DTYPES):
        raise _DamageError(f"it holds numbers of the types {sorted(map(str, unknown))}")
    if any(a != b for ((_, a), _), ((b, _), _) in zip([((0, 0), ""), *spans], spans, strict=False)):
        raise _DamageError("its tensors do not lie one after another")
    for entry in entries:
        if entry.size != math.prod(entry.shape) * _DTYPES[entry.dtype].itemsize:
            raise _DamageError(f"`{entry.name}` has {entry.size} bytes, which is not what its shape and type need")
    return entries, sparse, aliases


def _shape(shape: Any) -> list[int]:
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise TypeError(f"{shape!r} is no shape")
    return shape


def _read(source: Any, size: int) -> _Bytes:
    """So many bytes, piece by piece: what a damaged file promises is not there."""
    pieces = bytearray()
    while len(pieces) < size:
        try:
            piece = source.read(min(_PIECE, size - len(pieces)))
        except Exception as error:  # what a decompressor raises is no class that is known without it
            raise _DamageError(f"it cannot be decompressed ({error})") from error
        if not piece:
            raise _DamageError("it ends too early")
        pieces += piece
    return np.frombuffer(pieces, np.uint8)


def _zstandard() -> Any:
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Compression needs a package: pip install zstandard.") from error
    return zstandard
