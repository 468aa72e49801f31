"""The code on the how-to pages runs, block by block, in the order in which a reader meets it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs/howto").glob("*.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text("utf-8"))


def of_page(page: Path) -> object:
    """Commands start programs, which takes seconds each."""
    slow = [pytest.mark.slow] if any(language == "bash" for language, _ in blocks(page)) else []
    return pytest.param(page, id=page.stem, marks=slow)


@pytest.fixture
def beside_the_model(monkeypatch):
    """A working directory that holds the model of the pages, and in which commands find this package."""
    shutil.copy(ROOT / "docs/howto/digits.py", ".")
    programs = Path("bin").absolute()
    programs.mkdir()
    for name, arguments in {"python": "", "lightning-sparse": "-P -m lightning_sparse"}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        (programs / name).chmod(0o755)
    monkeypatch.syspath_prepend(os.getcwd())
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    yield
    sys.modules.pop("digits", None)


@pytest.mark.parametrize("page", [of_page(page) for page in PAGES])
def test_code_runs(page, beside_the_model):
    names = {"__name__": page.stem}
    for number, (language, text) in enumerate(blocks(page), 1):
        file = re.match(r"# (\w+\.\w+)\n", text)
        if file:
            Path(file[1]).write_text(text)
        elif language == "python":
            exec(compile(text, f"{page.name}, block {number}", "exec"), names)
        else:
            assert language == "bash", f"{page.name} has a block of {language!r}, which nobody runs"
            done = subprocess.run(["bash", "-ec", text], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr


def test_every_page_has_code():
    assert PAGES
    assert all(blocks(page) for page in PAGES)
