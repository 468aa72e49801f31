"""What is to be drawn of recorded runs, said without a drawing library."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lightning_sparse.reports.runs import Run, Table

__all__ = ["Bars", "Chart", "Heat", "Line", "Lines", "best", "comparison", "cut", "direction", "of_run", "shorten"]

# Okabe and Ito, without black and yellow, which are lost on dark and on light ground.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#8A8F98"
_DEPTH = ((68, 58, 131), (49, 104, 142), (33, 145, 140), (53, 183, 121), (122, 200, 70))  # viridis without its ends
_HIGHER = re.compile(r"acc|auc|auroc|bleu|dice|f1|iou|map|precision|r2|recall|score|top\d?", re.IGNORECASE)
_LOWER = re.compile(r"err|loss|mae|mse|nll|perplexity|ppl|wer", re.IGNORECASE)
_OURS = ("sparsity/", "flops/", "parameters/", "bytes/")


@dataclass(frozen=True)
class Chart:
    """One picture.

    Attributes:
        key: Name of its file.
        title: What it shows.
        note: What a reader has to know.
        x: Title of the axis.
        y: Title of the other axis; empty if the title says it.
        percent: Whether values are fractions.
    """

    key: str
    title: str
    note: str = ""
    x: str = "epochs"
    y: str = ""
    percent: bool = False


@dataclass(frozen=True)
class Line:
    """One curve; ``minor`` ones stay in the background, and out of the legend."""

    name: str
    points: Mapping[int, float]
    color: str
    dashed: bool = False
    minor: bool = False


@dataclass(frozen=True)
class Lines(Chart):
    """Curves over the epochs."""

    lines: Sequence[Line] = ()


@dataclass(frozen=True)
class Heat(Chart):
    """One row per weight, one column per epoch."""

    rows: Sequence[str] = ()
    columns: Sequence[int] = ()
    values: Table = field(default_factory=lambda: np.zeros((0, 0)))


@dataclass(frozen=True)
class Bars(Chart):
    """One row per weight, in which the bars of all groups start at zero; the first may be drawn behind the others."""

    rows: Sequence[str] = ()
    groups: Mapping[str, Sequence[float]] = field(default_factory=dict)
    colors: Sequence[str] = ()
    behind: bool = False


def of_run(run: Run, color: str = COLORS[0]) -> list[Chart]:
    """Charts of one run, weight by weight; those that have nothing to show are left out."""
    if not run.weights or not run.records:
        return []
    names, epochs = run.names, run.epochs
    charts: list[Chart] = [
        Heat(
            "sparsity-of-layers",
            "Sparsity of each layer",
            "Fraction of zeros; the first layer is on top.",
            percent=True,
            rows=names,
            columns=epochs,
            values=run.sparsity.T,
        )
    ]
    thresholds = run.table("thresholds")
    if not np.isnan(thresholds).all():
        shared = np.array_equal(thresholds, thresholds[:, :1].repeat(len(names), axis=1), equal_nan=True)
        lines = [Line("all layers", _points(epochs, thresholds[:, 0]), color)] if shared else _layers(run, thresholds)
        charts.append(Lines("thresholds", "Thresholds", _who(shared), lines=lines))
    charts += _flops(run, color)
    if not np.isnan(run.kept).any() and len(epochs) > 1:
        charts += _masks(run, color)
    dead = run.table("dead")
    if dead.any():
        outputs = np.array([weight["outputs"] for weight in run.weights], dtype=float)
        charts.append(
            Heat(
                "dead-outputs",
                "Dead outputs of each layer",
                f"Outputs that no weight reaches any more: {dead[-1].sum():.0f} of {outputs.sum():.0f} at the end.",
                percent=True,
                rows=names,
                columns=epochs,
                values=(dead / np.maximum(1, outputs)).T,
            )
        )
    return charts


def _who(shared: bool) -> str:
    return "One for all layers." if shared else "One curve per layer, from the first (violet) to the last (green)."


def _layers(run: Run, table: Table) -> list[Line]:
    few, names = len(run.names) <= 6, run.names
    pairs = zip(shorten(names) if few else names, table.T, strict=True)
    last = max(1, len(names) - 1)
    return [Line(name, _points(run.epochs, row), depth(i / last), minor=not few) for i, (name, row) in enumerate(pairs)]


def _points(epochs: Sequence[int], values: Iterable[float]) -> dict[int, float]:
    return {epoch: float(value) for epoch, value in zip(epochs, values, strict=True) if not math.isnan(value)}


def _flops(run: Run, color: str) -> list[Chart]:
    flops, charts = run.flops, list[Chart]()
    if not flops:
        return []
    rows = [name for name in flops if name] + ([""] if flops.get("") else [])
    dense, labels = [flops[name] for name in rows], [name or "(no weight)" for name in rows]
    note = "Multiply-accumulates, theoretical: {}. Grey: the dense model."
    for key, title, what, table, factor in (
        ("flops-inference", "FLOPs of each layer, inference", "per sample", 1.0 - run.sparsity, 1.0),
        ("flops-training", "FLOPs of each layer, training", "per sample, mean of the run", run.table("training"), 3.0),
    ):
        shares = dict(zip(run.names, table[-1].tolist(), strict=True))
        if any(math.isnan(share) for share in shares.values()):
            continue
        left = [factor * shares.get(name, 1.0) * count for name, count in zip(rows, dense, strict=True)]
        groups = {"dense": [factor * count for count in dense], run.name: left}
        share = sum(left) / max(1.0, sum(groups["dense"]))
        charts.append(
            Bars(
                key,
                f"{title}: {share:.1%}",
                note.format(what),
                x="multiply-accumulates",
                rows=labels,
                groups=groups,
                colors=(GREY, color),
                behind=True,
            )
        )
    return charts


def _masks(run: Run, color: str) -> list[Chart]:
    epochs, kept, total = run.epochs[1:], run.kept, max(1, sum(run.sizes))
    grown, dropped = run.table("grown")[1:], run.table("dropped")[1:]
    either = kept[1:].sum(1) + dropped.sum(1)
    overall = (kept[1:].sum(1) - grown.sum(1)) / np.maximum(1, either)
    layers = [Line(line.name, line.points, line.color, minor=True) for line in _layers(run, run.overlap)]
    return [
        Lines(
            "mask-overlap",
            "Overlap of successive masks",
            "Kept in both of two successive epochs, divided by kept in either. Thin: each layer.",
            percent=True,
            lines=[*layers, Line("all layers", _points(epochs, overall), color)],
        ),
        Lines(
            "dropped-and-grown",
            "Dropped and grown in each epoch",
            "Weights that are no longer kept, and that are kept anew, as fractions of all.",
            percent=True,
            lines=[
                Line("dropped", _points(epochs, dropped.sum(1) / total), COLORS[1]),
                Line("grown", _points(epochs, grown.sum(1) / total), COLORS[0], dashed=True),
            ],
        ),
    ]


def comparison(runs: Sequence[Run]) -> list[Chart]:
    """Charts in which all runs stand beside each other."""
    charts: list[Chart] = []
    metrics = sorted({metric for run in runs for metric in run.metrics if not metric.startswith(_OURS)})
    for key, title, sign in (("quality", "Higher is better", 1), ("loss", "Lower is better", -1)):
        chosen = [metric for metric in metrics if direction(metric) == sign]
        several = len(chosen) > 1 and len(runs) > 1
        lines = [
            Line(
                f"{run.name}, {metric}" if several else metric if len(runs) == 1 else run.name,
                run.curve(metric),
                COLORS[(i if len(runs) > 1 else j) % len(COLORS)],
                dashed=bool(j % 2),
            )
            for i, run in enumerate(runs)
            for j, metric in enumerate(chosen)
            if run.curve(metric)
        ]
        if lines:
            values = [value for line in lines for value in line.points.values()]
            percent = sign > 0 and all(0.0 <= value <= 1.0 for value in values if not math.isnan(value))
            charts.append(Lines(key, chosen[0] if len(chosen) == 1 else title, percent=percent, lines=lines))
    sparse = [(i, run) for i, run in enumerate(runs) if run.weights]
    lines = [Line(run.name, run.total_sparsity, COLORS[i % len(COLORS)]) for i, run in sparse]
    goals = [
        Line(f"{run.name}, target", run.curve("sparsity/target"), COLORS[i % len(COLORS)], dashed=True, minor=True)
        for i, run in sparse
        if run.curve("sparsity/target")
    ]
    if lines:
        note = "Of all weights under control." + (" Dashed: what is asked for." if goals else "")
        charts.insert(1, Lines("sparsity", "Sparsity", note, percent=True, lines=[*goals, *lines]))
    return charts + (_beside(runs) if len(runs) > 1 else [])


def _beside(runs: Sequence[Run]) -> list[Chart]:
    charts: list[Chart] = []
    sparse = [(i, run) for i, run in enumerate(runs) if run.weights and run.records]
    rows = list(dict.fromkeys(name for _, run in sparse for name in run.names))
    groups = {
        run.name: [dict(zip(run.names, run.sparsity[-1].tolist(), strict=True)).get(name, 0.0) for name in rows]
        for _, run in sparse
    }
    if len(groups) > 1:
        colors = [COLORS[i % len(COLORS)] for i, _ in sparse]
        title = "Sparsity of each layer at the end"
        charts.append(
            Bars("layers-compared", title, x="sparsity", percent=True, rows=rows, groups=groups, colors=colors)
        )
    if len(sparse) == 2 and all(run.records[0]["masks"] is not None for _, run in sparse):
        charts += _agreement(*(run for _, run in sparse))
    return charts


def _agreement(one: Run, other: Run) -> list[Chart]:
    """How much two runs keep the same weights, beside what chance alone would give."""
    mine, theirs = one.masks(), other.masks()
    found, chance, rows = list[float](), list[float](), list[str]()
    for name, mask in mine.items():
        if name in theirs and theirs[name].shape == mask.shape and mask.numel():
            a, b = float(mask.float().mean()), float(theirs[name].float().mean())
            either = int((mask | theirs[name]).sum())
            rows.append(name)
            found.append(int((mask & theirs[name]).sum()) / either if either else 1.0)
            chance.append(a * b / (a + b - a * b) if a + b > 0 else 1.0)
    if not rows:
        return []
    groups = {"chance": chance, "found": found}
    names = f"{cut(one.name)} and {cut(other.name)}"
    note = f"Kept by {names}, divided by kept by either. Grey: random masks of these sparsities."
    return [
        Bars(
            "masks-compared",
            "Agreement of the two runs",
            note,
            x="overlap",
            percent=True,
            rows=rows,
            groups=groups,
            colors=(GREY, COLORS[2]),
        )
    ]


# -- words and colours ------------------------------------------------------------------------------------------------


def direction(metric: str) -> int:
    """1 for what is better the higher it is, -1 the lower; 0 if the name does not tell."""
    if _LOWER.search(metric):
        return -1
    return 1 if _HIGHER.search(metric) else 0


def best(run: Run, metric: str) -> tuple[int, float] | None:
    """Epoch and value of the best moment among those that are about as sparse as the last one."""
    sparsity, sign = run.total_sparsity, direction(metric)
    last = sparsity[run.epochs[-1]] if sparsity else 0.0
    points = {
        epoch: value
        for epoch, value in run.curve(metric).items()
        if sparsity.get(epoch, 0.0) >= last - 0.005 and not math.isnan(value)
    }
    return max(points.items(), key=lambda point: sign * point[1]) if points and sign else None


def depth(position: float) -> str:
    """Colour of a layer by its place in the network, in ``[0, 1]``."""
    place = position * (len(_DEPTH) - 1)
    low = min(int(place), len(_DEPTH) - 2)
    mixed = (round(a + (place - low) * (b - a)) for a, b in zip(_DEPTH[low], _DEPTH[low + 1], strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def shorten(names: Sequence[str], width: int = 18) -> list[str]:
    """Names that fit beside a chart: without what all have in common, and abbreviated where they are too long.

    Example:
        >>> shorten(["model.stem.weight", "model.layer1.0.downsample.0.weight", "model.block.3.attention.out.weight"])
        ['stem', 'lay1.0.dow.0', 'blo.3.att.out']
    """
    parts = [name.split(".") for name in names]
    parts = [part[:-1] if len(part) > 1 and part[-1] == "weight" else part for part in parts]
    start = 0
    while len(names) > 1 and all(len(p) > start + 1 for p in parts) and len({p[start] for p in parts}) == 1:
        start += 1
    return [_abbreviate(p[start:], width) for p in parts]


def _abbreviate(parts: Sequence[str], width: int) -> str:
    """Keep numbers and the last part as long as they fit."""
    short = ".".join(parts)
    for letters in (3, 1):
        if len(short) > width:
            short = ".".join(
                [*(re.sub(rf"^([^\d]{{{letters}}})[^\d]*", r"\1", part) for part in parts[:-1]), parts[-1]]
            )
    return cut(short, width)


def cut(name: str, width: int = 28) -> str:
    """The beginning and the end of a name that is too long."""
    half = (width - 1) // 2
    return name if len(name) <= width else f"{name[: width - 1 - half]}…{name[-half:]}"
