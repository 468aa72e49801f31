r"""The file in which a run is kept: lines of JSON, of which each holds what was seen at one moment.

The first line says what is trained: ``methods``, and ``weights`` with their shapes. Every other line has the number of
epochs done (``epoch``), of optimizer steps (``step``), the logged ``metrics`` and, as lists in the order of the
weights, ``zeros``, ``dead`` outputs, ``thresholds``, entries ``dropped`` and ``grown`` since the line before, and
``training``, the FLOPs that each weight has caused so far as a fraction of those of dense training. ``flops`` (dense,
per sample) stand in the first line that knows them.

``masks`` is what has changed since the line before, and before the first line nothing was kept: all weights stand in a
row, and each number is of how many entries lie between two that have changed; 255 means that there are 255 and more to
come. The numbers are bytes, compressed by zlib, in base64. To read them without this package::

    import base64, json, pathlib, zlib, numpy as np

    first, *lines = map(json.loads, pathlib.Path("run.jsonl").read_text().splitlines())
    mask = np.zeros(sum(np.prod(weight["shape"]) for weight in first["weights"]), bool)
    for line in lines:
        gaps = np.frombuffer(zlib.decompress(base64.b64decode(line["masks"])), np.uint8)
        mask[(np.cumsum(gaps + (gaps < 255), dtype=int) - 1)[gaps < 255]] ^= True  # after this line
"""

import base64
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

__all__ = ["Run", "RunFile", "read_run"]

FORMAT = "lightning-sparse run 1"
Bits: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]
Table: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Run:
    """What was seen of a run, moment by moment: before training, then at the end of each epoch.

    Attributes:
        name: By what the run is told from others.
        methods: Per sparse-training callback its ``"name"`` and ``"arguments"``; none if the training was dense.
        weights: Per weight under control its ``"name"``, ``"shape"`` and number of ``"outputs"``.
        records: Per moment what its line in the file holds.
    """

    name: str
    methods: list[dict[str, Any]]
    weights: list[dict[str, Any]]
    records: list[dict[str, Any]]

    @property
    def names(self) -> list[str]:
        """Names of the weights under control."""
        return [weight["name"] for weight in self.weights]

    @property
    def sizes(self) -> list[int]:
        """Their numbers of entries."""
        return [math.prod(weight["shape"]) for weight in self.weights]

    @property
    def epochs(self) -> list[int]:
        """Number of epochs done at each moment."""
        return [record["epoch"] for record in self.records]

    @property
    def metrics(self) -> list[str]:
        """Names of all that was logged, sorted."""
        return sorted({name for record in self.records for name in record["metrics"]})

    def curve(self, metric: str) -> dict[int, float]:
        """What was logged under a name, by the number of epochs done."""
        return {r["epoch"]: r["metrics"][metric] for r in self.records if metric in r["metrics"]}

    def table(self, key: str) -> Table:
        """One number per moment and weight, such as of ``"dead"`` outputs; nan where there is none."""
        rows = [record[key] or [None] * len(self.weights) for record in self.records]
        return np.array(rows, dtype=float).reshape(len(self.records), len(self.weights))

    @property
    def sparsity(self) -> Table:
        """Fraction of zeros per moment and weight."""
        return self.table("zeros") / np.maximum(1, self.sizes)

    @property
    def total_sparsity(self) -> dict[int, float]:
        """Fraction of zeros among all weights under control, by the number of epochs done."""
        return {r["epoch"]: sum(r["zeros"]) / max(1, sum(self.sizes)) for r in self.records if self.weights}

    @property
    def overlap(self) -> Table:
        """How much each mask overlaps the one before it: kept by both, divided by kept by either; nan at first."""
        kept, grown, dropped = self.kept, self.table("grown"), self.table("dropped")
        either = kept + dropped
        overlap = np.where(either == 0, 1.0, (kept - grown) / np.maximum(1, either))
        overlap[:1] = np.nan
        return overlap

    @property
    def kept(self) -> Table:
        """Number of kept entries per moment and weight."""
        return np.cumsum(self.table("grown") - self.table("dropped"), axis=0)

    @property
    def flops(self) -> dict[str, float]:
        """Dense forward FLOPs per sample by the weight that causes them, dense layers included, under "" the rest."""
        return next((dict(record["flops"]) for record in self.records if "flops" in record), {})

    def masks(self, epoch: int | None = None) -> dict[str, Tensor]:
        """Keep set of each weight, bool, True = kept.

        Args:
            epoch: After how many epochs; None for the last moment.

        Raises:
            ValueError: If the run has no such moment, or it was recorded without masks.
        """
        moments = {record["epoch"]: index for index, record in enumerate(self.records)}
        epoch = self.epochs[-1] if epoch is None and moments else epoch
        if epoch not in moments:
            raise ValueError(f"Expected argument `epoch` to be one of {list(moments)}, but got {epoch}.")
        if self.weights and self.records[0]["masks"] is None:
            raise ValueError(f"Expected `{self.name}` to be recorded with masks, but it was with `masks=False`.")
        bits = _replay(self.records[: moments[epoch] + 1], sum(self.sizes))
        parts = np.split(bits, np.cumsum(self.sizes)[:-1]) if self.weights else []
        shapes = [weight["shape"] for weight in self.weights]
        return {
            name: torch.from_numpy(part.copy()).view(shape)
            for name, part, shape in zip(self.names, parts, shapes, strict=True)
        }


def read_run(path: str | Path) -> Run:
    r"""Read what a :class:`~lightning_sparse.RunRecorder` has written; nothing in the file is run.

    A last line that is incomplete, as a crash leaves it, is ignored.

    Args:
        path: The file, or the folder in which it is ``run.jsonl``.

    Raises:
        FileNotFoundError: If it does not exist.
        ValueError: If it is no such file, or damaged.

    Example:
        >>> _ = Path("run.jsonl").write_text('{"format": "lightning-sparse run 1", "methods": [], "weights": []}\n')
        >>> read_run("run.jsonl").epochs
        []
    """
    path = Path(path) / "run.jsonl" if Path(path).is_dir() else Path(path)
    lines = [line for line, _ in _lines(path)]
    if not lines or not _is_header(lines[0]):
        raise ValueError(f"Expected argument `path` to be a file that `RunRecorder` has written, but got '{path}'.")
    header, *records = lines
    sizes = [math.prod(weight["shape"]) for weight in header["weights"]]
    for number, record in enumerate(records, start=2):
        if not _is_record(record, sizes):
            raise ValueError(f"Expected '{path}' to be undamaged, but line {number} does not belong there.")
    name = path.parent.name if path.name == "run.jsonl" and path.parent.name else path.stem
    return Run(name, header["methods"], header["weights"], records)


class RunFile:
    """The file of a run that is going on.

    Args:
        path: Where it is.
        header: What the first line holds besides the format.

    Attributes:
        epoch: Of the last line, -1 if there is none.
        knows_flops: Whether a line holds the FLOPs.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path, self._header = path, json.loads(json.dumps({"format": FORMAT, **header}))
        self._sizes = [math.prod(weight["shape"]) for weight in header["weights"]]
        self._bits: Bits = np.zeros(sum(self._sizes), bool)
        self.epoch, self.knows_flops = -1, False

    def open(self, step: int, earlier: Path | None = None) -> None:
        """Go on with the lines up to an optimizer step, if there are any; else begin.

        Args:
            step: Where training goes on; at 0 it begins.
            earlier: A file of the same run, which is copied if there is none yet.

        Raises:
            ValueError: If there is another file in its place.
        """
        source = self.path if self.path.exists() or earlier is None or not earlier.exists() else earlier
        header, *lines = list(_lines(source, until_damaged=True) if source.exists() else ()) or [({}, b"")]
        if source.exists() and source.stat().st_size and not _is_header(header[0]):
            raise ValueError(f"Expected argument `path` to be a new file or that of a run, but got '{source}'.")
        kept = []
        if step and header[0].get("weights") == self._header["weights"]:
            kept = [(line, raw) for line, raw in lines if _is_record(line, self._sizes) and line["step"] <= step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        parts = self.path.with_name(self.path.name + ".part")
        _write(parts, [json.dumps(self._header).encode(), *(raw for _, raw in kept)], "wb")
        parts.replace(self.path)
        self._bits = _replay([line for line, _ in kept], len(self._bits))
        self.epoch = kept[-1][0]["epoch"] if kept else -1
        self.knows_flops = any("flops" in line for line, _ in kept)

    def append(self, record: Mapping[str, Any], masks: Sequence[Bits] | None) -> None:
        """Add a line, which is on the disk when this returns.

        Args:
            record: What it holds.
            masks: Flat keep sets of the weights now; None to leave out what is known from them.
        """
        seen: dict[str, Any] = dict.fromkeys(("grown", "dropped", "masks"))
        if masks is not None:
            now = np.concatenate([*masks, np.zeros(0, bool)])
            flips, ends = now ^ self._bits, np.cumsum(self._sizes, dtype=int)
            for key, some in (("grown", flips & now), ("dropped", flips & ~now)):
                seen[key] = [int(part.sum()) for part in np.split(some, ends)[:-1]]
            seen["masks"], self._bits = _encode(flips), now
        _write(self.path, [json.dumps({**record, **seen}).encode()], "ab")
        self.epoch, self.knows_flops = record["epoch"], self.knows_flops or "flops" in record


def _write(path: Path, lines: Iterable[bytes], mode: str) -> None:
    with path.open(mode) as file:
        file.writelines(line + b"\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())


def _lines(path: Path, *, until_damaged: bool = False) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Each complete line as what it says and as it is written."""
    for number, raw in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict):
            yield line, raw
        elif number == 1:
            yield {}, raw
        elif until_damaged:
            return
        else:
            raise ValueError(f"Expected '{path}' to be undamaged, but line {number} cannot be read.")


def _is_header(line: dict[str, Any]) -> bool:
    try:
        sizes = [type(size) is int and size >= 0 for weight in line["weights"] for size in weight["shape"]]
        return line["format"] == FORMAT and isinstance(line["methods"], list) and all(sizes)
    except (KeyError, TypeError):
        return False


def _is_record(line: dict[str, Any], sizes: Sequence[int]) -> bool:
    try:
        lists = [line[key] for key in ("zeros", "dead", "thresholds", "training", "grown", "dropped")]
        whole = all(some is None or len(some) == len(sizes) for some in lists)
        numbers = all(type(line[key]) is int for key in ("epoch", "step"))
        if line["masks"] is not None:
            _decode(line["masks"], sum(sizes))
        return whole and numbers and isinstance(line["metrics"], dict)
    except (KeyError, TypeError, ValueError):
        return False


def _encode(flips: Bits) -> str:
    """Write down where bits are set."""
    runs, rest = np.divmod(np.diff(np.flatnonzero(flips), prepend=-1) - 1, 255)
    gaps = np.full(int(runs.sum()) + len(runs), 255, np.uint8)
    gaps[np.cumsum(runs + 1) - 1] = rest
    # Huffman codes alone come within a few per cent of the entropy of random changes; structured ones repeat.
    packers = [zlib.compressobj(9, strategy=strategy) for strategy in (zlib.Z_HUFFMAN_ONLY, zlib.Z_DEFAULT_STRATEGY)]
    packed = [packer.compress(gaps.tobytes()) + packer.flush() for packer in packers]
    return base64.b64encode(min(packed, key=len)).decode()


def _decode(text: str, total: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Find where bits are set, of so many.

    Raises:
        ValueError: If the text says nothing of the kind.
    """
    try:
        # No more than there can be, whatever the text promises.
        gaps = np.frombuffer(zlib.decompressobj().decompress(base64.b64decode(text), total + 1), np.uint8)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    places = (np.cumsum(gaps + (gaps < 255), dtype=np.int64) - 1)[gaps < 255]
    if len(places) and places[-1] >= total:
        raise ValueError(f"entry {places[-1]} of {total}")
    return places


def _replay(records: Iterable[Mapping[str, Any]], total: int) -> Bits:
    """The bits after some lines."""
    bits = np.zeros(total, bool)
    for record in records:
        if record["masks"] is not None:
            bits[_decode(record["masks"], total)] ^= True
    return bits
