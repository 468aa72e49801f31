"""What users can import is exported, documented with an example, and spelled in the README as it is in the code."""

import ast
import inspect
import re
from importlib.metadata import version
from pathlib import Path
from types import FunctionType

import pytest

import lightning_sparse

ROOT = Path(__file__).parents[1]
PACKAGE = Path(lightning_sparse.__file__).parent
README = (ROOT / "README.md").read_text("utf-8")


def documented() -> list[str]:
    """Public classes and functions; warnings and errors need no example."""
    objects = ((name, getattr(lightning_sparse, name, None)) for name in lightning_sparse.__all__)
    return [
        name
        for name, value in objects
        if inspect.isfunction(value) or (inspect.isclass(value) and not issubclass(value, BaseException))
    ]


def strategy_classes() -> list[str]:
    files = sorted((PACKAGE / "strategies").glob("*.py"))
    nodes = (node for file in files for node in ast.parse(file.read_text("utf-8")).body)
    names = [node.name for node in nodes if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    return [name for name in names if name not in ("Exchange", "SparseToSparse")]  # bases, of no use by themselves


def own_arguments(value: type | FunctionType) -> list[str]:
    """Arguments by name; none for a class that takes its constructor from another one."""
    if inspect.isclass(value) and "__init__" not in vars(value):
        return []
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [name for name, parameter in inspect.signature(value).parameters.items() if parameter.kind not in variadic]


def readme_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def test_all_is_sorted_without_repetition():
    assert list(lightning_sparse.__all__) == sorted(set(lightning_sparse.__all__))


@pytest.mark.parametrize("name", lightning_sparse.__all__)
def test_every_name_of_all_exists(name):
    assert hasattr(lightning_sparse, name)


@pytest.mark.parametrize("name", strategy_classes())
def test_every_strategy_is_exported(name):
    assert name in lightning_sparse.__all__


@pytest.mark.parametrize("name", documented())
def test_docstring_has_an_example(name):
    docstring = vars(lightning_sparse)[name].__doc__ or ""
    assert ">>> " in docstring, f"{name} needs an `Example:` section with a doctest"


@pytest.mark.parametrize("name", documented())
def test_docstring_names_every_argument(name):
    value = getattr(lightning_sparse, name)
    docstring = value.__doc__ or ""
    section = re.search(r"^ *Args:\n(.*?)(?=^ *[A-Z]\w+:\n|\Z)", docstring, flags=re.DOTALL | re.MULTILINE)
    described = re.findall(r"^ *(\w+)(?: \(.*?\))?:", section.group(1), flags=re.MULTILINE) if section else []
    assert [argument for argument in own_arguments(value) if argument not in described] == []
    assert section or not own_arguments(value), f"{name} needs an `Args:` section"


def test_package_tells_type_checkers_that_it_is_typed():
    assert (PACKAGE / "py.typed").is_file()


def test_version_is_the_installed_one():
    assert lightning_sparse.__version__ == version("lightning-sparse")


@pytest.mark.parametrize("block", readme_blocks(), ids=[f"block {n}" for n, _ in enumerate(readme_blocks(), 1)])
def test_readme_code_compiles_and_imports_what_exists(block):
    tree = ast.parse(block)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "lightning_sparse":
            assert {alias.name for alias in node.names} <= set(lightning_sparse.__all__)


def test_readme_shows_code():
    assert readme_blocks()
