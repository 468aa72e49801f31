"""Keeps what the comparisons with the references measure, for `pytest tests/strategies --conformance FILE`.

A plugin: a test hands what it measured on with its report, from whichever process it ran in. At the end of a session
that passed, the table goes to FILE, between its markers. Without the option nothing happens.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from lightning_sparse import strategies
from lightning_sparse.cards import fill, table

STEPS = 100  # what a method has to be compared over, at least, in both precisions
TITLES = ["method", "trainings", "steps", "optimizers", "float64", "float32", "entries of masks that differ"]


@dataclass(frozen=True)
class Measured:
    """One training next to its reference.

    Attributes:
        method: Class of the callback.
        optimizer: Class of the optimizer.
        dtype: Of the weights.
        steps: Optimizer steps.
        difference: Largest one of weights, latents, thresholds and all other parameters and buffers at the end.
        wrong: Entries of masks that differ.
    """

    method: str
    optimizer: str
    dtype: str
    steps: int
    difference: float
    wrong: int


_MEASURED: list[Measured] = []  # by the test that runs


def record(callback, optimizer, dtype, steps, found):
    """Note the differences that `side_by_side.differences` has found."""
    method = next((cls.__name__ for cls in type(callback).__mro__ if cls.__name__ in strategies.__all__), "")
    found = dict(found)
    wrong = found.pop("wrong in masks") + found.pop("zeros not as masked")
    name = type(optimizer).__name__ + (" (Nesterov)" if optimizer.defaults.get("nesterov") else "")
    _MEASURED.append(Measured(method, name, str(dtype).removeprefix("torch."), steps, max(found.values()), wrong))


def make_table(measured):
    """Markdown, and what is missing."""
    rows, missing = [], []
    for name in strategies.__all__:
        own = [one for one in measured if one.method == name]
        largest = {}
        for dtype in ("float64", "float32"):
            same = [one for one in own if one.dtype == dtype]
            if max((one.steps for one in same), default=0) < STEPS:
                missing.append(f"{name} in {dtype}")
            largest[dtype] = f"{max((one.difference for one in same), default=math.nan):.0e}".replace(
                "0e+00", "0"
            ).replace("e-0", "e-")
        steps = [one.steps for one in own] or [0]
        span = f"{min(steps)} – {max(steps)}" if min(steps) < max(steps) else f"{steps[0]}"
        optimizers = ", ".join(sorted({one.optimizer for one in own}))
        wrong = sum(one.wrong for one in own)
        rows.append([name, f"{len(own)}", span, optimizers, largest["float64"], largest["float32"], f"{wrong}"])
    return table(TITLES, rows), missing


def pytest_addoption(parser):
    parser.addoption("--conformance", metavar="FILE", help="write what the comparisons with references measured")


def pytest_configure(config):
    if config.getoption("conformance"):
        config.pluginmanager.register(Collector(Path(config.getoption("conformance")).absolute()))


class Collector:
    """Gathers what tests have measured, and writes it."""

    def __init__(self, path):
        self.path, self.measured, self.missing = path, [], []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        _MEASURED.clear()
        yield
        item.user_properties.append(("conformance", [asdict(one) for one in _MEASURED]))

    def pytest_runtest_logreport(self, report):
        if report.when == "call":
            rows = (row for name, rows in report.user_properties if name == "conformance" for row in rows)
            self.measured += [Measured(**row) for row in rows]

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session, exitstatus):
        if exitstatus != pytest.ExitCode.OK or hasattr(session.config, "workerinput"):
            return
        text, self.missing = make_table(self.measured)
        if self.missing:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        else:
            self.path.write_text(fill(self.path.read_text("utf-8"), {"conformance": text}), "utf-8")

    def pytest_terminal_summary(self, terminalreporter, exitstatus):
        terminalreporter.write_line(make_table(self.measured)[0])
        if self.missing:
            missing = ", ".join(self.missing)
            terminalreporter.write_line(f"Not compared over {STEPS} steps with a reference: {missing}.", red=True)
