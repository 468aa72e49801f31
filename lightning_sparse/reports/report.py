"""The state of a sparse model as plain data."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from lightning_sparse.flops import readable

__all__ = ["PER_LAYER", "Report", "Row"]

# Beginnings of the names of what is logged per layer, on request.
PER_LAYER = ("sparsity/layer/", "threshold/", "dead_outputs/", "mask_overlap/")


@dataclass(frozen=True)
class Row:
    """One parameter.

    Attributes:
        name: Name of the parameter.
        shape: Its shape.
        treated: Whether it is made sparse.
        reason: Kind of layer if treated, else why not.
        zeros: Number of its entries that are zero; None if they were not counted.
        threshold: Its threshold, if it is pruned by one.
        flops: Dense forward FLOPs per sample due to it; None if unknown.
        dead_outputs: Number of outputs of its layer that none of its entries reaches; None if they were not counted.
    """

    name: str
    shape: tuple[int, ...]
    treated: bool
    reason: str
    zeros: int | None = None
    threshold: float | None = None
    flops: float | None = None
    dead_outputs: int | None = None

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def sparsity(self) -> float | None:
        """Fraction of zeros, in ``[0, 1]``."""
        return None if self.zeros is None else self.zeros / max(1, self.numel)

    def measured(
        self, zeros: int, threshold: float | None, flops: float | None, dead_outputs: int | None = None
    ) -> "Row":
        """Return the row with what has been found out."""
        return dataclasses.replace(self, zeros=zeros, threshold=threshold, flops=flops, dead_outputs=dead_outputs)


@dataclass(frozen=True)
class Report:
    """Rows of all parameters, and totals. Prints as a table of the treated ones.

    Attributes:
        method: Name of the method.
        rows: One row per parameter.
        totals: The logged numbers, such as ``"sparsity/total"`` and ``"flops/inference_ratio"``.
        uncounted: What ran in the forward pass without being counted as FLOPs, with the number of occurrences.

    Example:
        >>> row = Row("weight", (2, 4), treated=True, reason="Linear", zeros=6, threshold=0.5)
        >>> print(Report("ST3", [row], {"sparsity/total": 0.75}).to_markdown())
        | weight | shape | sparsity | threshold | FLOPs dense | FLOPs sparse |
        |---|---|---|---|---|---|
        | weight | 2×4 | 75.00 % | 0.5 | – | – |
        <BLANKLINE>
        sparsity/total: 0.75
    """

    method: str
    rows: list[Row]
    totals: dict[str, float]
    uncounted: dict[str, int] = field(default_factory=dict)

    @classmethod
    def header(cls) -> list[str]:
        """Titles of the columns of :meth:`cells`."""
        return ["weight", "shape", "sparsity", "threshold", "FLOPs dense", "FLOPs sparse"]

    def cells(self) -> list[list[str]]:
        """The treated rows as text."""
        return [
            [
                row.name,
                "×".join(map(str, row.shape)),
                "–" if row.sparsity is None else f"{row.sparsity:.2%}".replace("%", " %"),
                "–" if row.threshold is None else f"{row.threshold:.4g}",
                "–" if row.flops is None else readable(row.flops),
                "–" if row.flops is None else readable(row.flops * (1 - (row.sparsity or 0.0))),
            ]
            for row in self.rows
            if row.treated
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, strings, lists and dicts."""
        rows = [dataclasses.asdict(row) | {"shape": list(row.shape), "sparsity": row.sparsity} for row in self.rows]
        return {"method": self.method, "rows": rows, "totals": dict(self.totals), "uncounted": dict(self.uncounted)}

    def to_markdown(self) -> str:
        """A table of the treated weights, then the totals."""
        lines = ["| " + " | ".join(line) + " |" for line in [self.header(), *self.cells()]]
        lines.insert(1, "|---" * len(self.header()) + "|")
        return "\n".join([*lines, "", *(f"{key}: {value:.6g}" for key, value in self.totals.items())])

    def __str__(self) -> str:
        """The table in plain text."""
        lines = [self.header(), *self.cells()]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header()))]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        return "\n".join([self.method, *table, *(f"{key}: {value:.6g}" for key, value in self.totals.items())])
