"""The shape of the package: who may import whom, what a strategy may define, how long a file may be."""

import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "lightning_sparse"

# layer -> what it may import of the package. A layer is a folder or a module directly below the package.
ARROW = {
    "functional": {"functional"},
    "schedules": {"functional", "schedules"},
    "cards": set(),
    "engine": {"cards", "functional", "schedules", "engine", "flops", "reports", "_untouched"},
    "strategies": {"cards", "functional", "schedules", "engine", "strategies"},
    "metrics": {"functional", "engine.targets", "flops", "metrics"},
    "_fit": {"engine.budgets"},
    "_flop_handles": set(),
    "_untouched": set(),
    "flops": {"_flop_handles", "_untouched", "flops", "functional"},
    "reports": {"functional", "engine.targets", "flops", "reports"},
    "export": {"functional", "engine.targets", "export", "reports"},
}
FREE = {"__init__", "__main__", "_commands"}
MATHS_ONLY = {"__future__", "collections", "functools", "math", "torch", "typing"}  # all that functional/ may import
NEVER_LIGHTNING = {"cards", "functional", "schedules"}
LIGHTNING = {"lightning", "lightning_fabric", "pytorch_lightning"}
ENGINE_ONLY = {"setup", "teardown", "state_dict", "load_state_dict"}  # and on_*
FILE_LINES = 400
STRATEGY_CODE_LINES = 80


def layer_of(path: str) -> str:
    """``"engine/targets.py"`` -> ``"engine"``, ``"flops.py"`` -> ``"flops"``."""
    return path.split("/")[0].removesuffix(".py")


def imported(tree: ast.Module, path: str, modules: set[str]) -> Iterator[str]:
    """Dotted names of all imports, lazy ones and those for type checkers too; submodules as far as they exist."""
    parents = [PACKAGE, *path.split("/")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{module}.{alias.name}"
                yield name if name in modules or module == PACKAGE else module


def check_imports(tree: ast.Module, path: str, modules: set[str]) -> Iterator[str]:
    layer = layer_of(path)
    if layer in FREE:
        return
    if layer not in ARROW:
        yield f"is no layer of ARROW in {Path(__file__).name}; decide there what it may import"
        return
    for name in imported(tree, path, modules):
        top, _, inside = name.partition(".")
        if top == PACKAGE:
            if not any(f"{inside}.".startswith(f"{allowed}.") for allowed in ARROW[layer]):
                yield f"imports {name}; {layer} may import {sorted(ARROW[layer])} only"
        elif layer == "functional" and top not in MATHS_ONLY:
            yield f"imports {name}; functional may import {sorted(MATHS_ONLY)} only"
        elif layer in NEVER_LIGHTNING and top in LIGHTNING:
            yield f"imports {name}; {layer} must not know Lightning"


def check_hooks(tree: ast.Module, path: str, modules: set[str]) -> Iterator[str]:
    if layer_of(path) != "strategies":
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for name in names_bound_in(node):
                if name.startswith("on_") or name in ENGINE_ONLY:
                    yield f"{node.name} defines {name}, which belongs to the engine"


def names_bound_in(node: ast.ClassDef) -> Iterator[str]:
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            yield statement.name
        elif isinstance(statement, ast.Assign):
            yield from (target.id for target in statement.targets if isinstance(target, ast.Name))
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            yield statement.target.id


def check_prints(tree: ast.Module, path: str, modules: set[str]) -> Iterator[str]:
    if path in ("__main__.py", "_commands.py"):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield f"prints in line {node.lineno}; use `logging` or `self.log`"


def code_lines(source: str, tree: ast.Module) -> int:
    """Lines that hold code: no blank lines, comments or docstrings."""
    docstrings: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if ast.get_docstring(node, clean=False) is not None and first is not None:
                docstrings.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def check_lengths(source: str, tree: ast.Module, path: str) -> Iterator[str]:
    if (total := len(source.splitlines())) > FILE_LINES:
        yield f"has {total} lines; a file may have {FILE_LINES}"
    if layer_of(path) == "strategies" and (code := code_lines(source, tree)) > STRATEGY_CODE_LINES:
        yield f"has {code} lines of code; a strategy may have {STRATEGY_CODE_LINES}"


def check(sources: dict[str, str]) -> list[str]:
    """All offences against the rules above, as sentences; ``sources`` maps paths inside the package to their text."""
    names = (path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in sources)
    modules = {f"{PACKAGE}.{name}" for name in names}
    offences = []
    for path, source in sorted(sources.items()):
        tree = ast.parse(source)
        found = [
            message for rule in (check_imports, check_hooks, check_prints) for message in rule(tree, path, modules)
        ]
        found += check_lengths(source, tree, path)
        offences += [f"{PACKAGE}/{path} {message}" for message in found]
    return offences


def test_package_keeps_the_rules():
    folder = ROOT / PACKAGE
    sources = {file.relative_to(folder).as_posix(): file.read_text("utf-8") for file in folder.rglob("*.py")}
    offences = check(sources)
    assert not offences, "\n".join(offences)


KEPT = {
    "__init__.py": "from lightning_sparse.strategies.st3 import ST3",
    "__main__.py": "print('hello')",
    "functional/masks.py": "import math\nimport torch\nfrom collections.abc import Sequence",
    "functional/scores.py": "from torch import Tensor\nfrom .masks import topk_mask",
    "schedules.py": "import dataclasses\nfrom lightning_sparse.functional import masks",
    "engine/__init__.py": "from lightning_sparse.engine.targets import Target",
    "engine/callback.py": "import lightning\nfrom lightning_sparse import flops, schedules",
    "engine/targets.py": "",
    "strategies/st3.py": "from lightning_sparse.engine import Base\nclass ST3(Base):\n    def select(self): ...",
    "flops.py": "import fvcore",
    "metrics/sparsity.py": "from lightning_sparse.engine import targets\nfrom lightning_sparse.functional import masks",
    "reports/table.py": "from lightning_sparse.engine.targets import Target",
}


def test_rules_accept_what_is_allowed():
    assert check(KEPT) == []


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("functional/masks.py", "import numpy", "imports numpy; functional may"),
        ("functional/masks.py", "import torchmetrics.utilities", "imports torchmetrics.utilities"),
        (
            "functional/masks.py",
            "def f():\n    from lightning_sparse.schedules import Cubic",
            "imports lightning_sparse.sch",
        ),
        ("functional/masks.py", "from .. import schedules", "imports lightning_sparse.schedules"),
        ("functional/masks.py", "import lightning_sparse", "imports lightning_sparse; "),
        ("functional_extra.py", "", "is no layer"),
        ("schedules.py", "from lightning_sparse.engine import targets", "imports lightning_sparse.engine.targets"),
        ("schedules.py", "from lightning.pytorch import Trainer", "must not know Lightning"),
        ("engine/callback.py", "from lightning_sparse.strategies import ST3", "imports lightning_sparse.strategies"),
        ("engine/callback.py", "from lightning_sparse import ST3", "imports lightning_sparse.ST3"),
        ("strategies/st3.py", "from ..reports.table import Table", "imports lightning_sparse.reports.table"),
        ("metrics/sparsity.py", "from lightning_sparse.engine import Target", "imports lightning_sparse.engine; "),
        ("flops.py", "from lightning_sparse.engine.callback import x", "imports lightning_sparse.engine.callback"),
        ("reports/table.py", "import lightning_sparse.strategies", "imports lightning_sparse.strategies"),
        ("strategies/st3.py", "class A:\n    def on_train_start(self): ...", "A defines on_train_start"),
        ("strategies/st3.py", "class A:\n    async def setup(self): ...", "A defines setup"),
        ("strategies/st3.py", "class A:\n    state_dict = None", "A defines state_dict"),
        ("strategies/st3.py", "class A:\n    class B:\n        on_x: int = 3", "B defines on_x"),
        ("engine/callback.py", "def f():\n    print('x')", "prints in line 2"),
        ("strategies/st3.py", '"""Doc."""\n# comment\n\n' + "x = 1\n" * 81, "has 81 lines of code"),
        ("engine/callback.py", "# comment\n" * 401, "has 401 lines"),
    ],
)
def test_rules_refuse(path, source, message):
    offences = check({**KEPT, path: source})
    assert len(offences) == 1
    assert message in offences[0]


def test_code_lines_leave_out_blanks_comments_and_docstrings():
    docstring, comment, code = '"""Doc\n\nof a module."""\n', "# comment\n", 'x = """two\nlines"""\n'
    source = f'{docstring}\n\nclass A:  # comment\n    """Doc."""\n\n    {comment}    {code}'
    assert code_lines(source, ast.parse(source)) == 3


def test_maths_only_is_torch_and_the_standard_library():
    assert MATHS_ONLY - {"torch"} <= set(sys.stdlib_module_names)
