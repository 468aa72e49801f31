"""Budgets of layers from a table."""

import csv
from os import PathLike
from pathlib import Path

from lightning_sparse.engine.checks import check_choice, check_fraction

__all__ = ["read_budgets"]


def read_budgets(
    path: str | PathLike[str], column: str | None = None, *, prefix: str = ""
) -> dict[str, dict[str, float] | None]:
    r"""Read budgets of layers from a CSV file, for the argument ``overrides``.

    The first column names parameters, modules or other patterns, the others hold sparsities: fractions, or per cent
    where the title of the first of them, or the number itself, has a ``%``. A title ``Params`` marks the layout of
    the tables that the authors of STR publish: names after a dash (``Layer 1 - conv1``), then numbers of parameters and
    of FLOPs, then columns that go by the sparsity of the whole network, which stands in a row of its own.

    Args:
        path: The file.
        column: Title of the column to read; in tables of STR, the sparsity in the row ``Overall``. By default the only
            one there is.
        prefix: Put before each name, such as ``"model."`` where the network is an attribute of the LightningModule.

    Returns:
        Per name ``{"sparsity": ...}``.

    Raises:
        ValueError: If a number is no sparsity, or the column is not there.

    Example:
        >>> Path("budgets.csv").write_text("layer,sparsity (%)\nconv1,51.4\nfc,90\n")
        36
        >>> read_budgets("budgets.csv", prefix="model.")
        {'model.conv1': {'sparsity': 0.514}, 'model.fc': {'sparsity': 0.9}}
    """
    rows = [row for row in csv.reader(Path(path).read_text("utf-8-sig").splitlines()) if any(row)]
    titles, first, percent = rows[0], 1, any("%" in title for title in rows[0])
    if "Params" in titles:
        titles, first = next(row for row in rows if row[0] == "Overall"), 3
        rows = [[row[0].partition(" - ")[2], *row[1:]] for row in rows if " - " in row[0] and row[1] != "0"]
    else:
        rows = rows[1:]
    if column is None and len(titles) == first + 1:
        column = titles[first]
    check_choice("column", column, titles[first:])
    at = titles.index(str(column), first)
    return {f"{prefix}{row[0]}": {"sparsity": _fraction(row[0], row[at], percent)} for row in rows}


def _fraction(name: str, number: str, percent: bool) -> float:
    try:
        value = float(number.rstrip("% "))
    except ValueError:
        raise ValueError(f"Expected the budget of `{name}` to be a number, but got {number!r}.") from None
    value = round(value / 100, 12) if percent or "%" in number else value
    check_fraction(name, value)
    return value
