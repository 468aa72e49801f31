"""Settings of the documentation site, and the pages that are made of classes, modules and notebooks; `make site`."""

import importlib
import json
import pkgutil
import re
from pathlib import Path

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml

import lightning_sparse
from lightning_sparse import cards, strategies

DOCS = Path(__file__).parent

project = "lightning-sparse"
version = release = lightning_sparse.__version__
project_copyright = "The lightning-sparse authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["**.ipynb_checkpoints"]

html_theme = "furo"
html_title = "lightning-sparse"
html_copy_source = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4  # as GitHub has them
myst_fence_as_directive = ["math"]
suppress_warnings = ["myst.header"]  # methods.md goes from its title to the third level

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_display_short_literal_types = True
autodoc_typehints_format = "short"
napoleon_use_ivar = True
python_maximum_signature_line_length = 80
copybutton_exclude = ".linenos, .gp, .go"  # no prompts and no output of examples

# A reference to something of this package has to lead somewhere.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!lightning_sparse\b).*")]


# -- pages that are not written by hand -------------------------------------------------------------------------------

# Beside the modules directly below the package, what those need who write methods.
FOR_METHODS = ["engine.callback", "engine.latent", "engine.rewind", "engine.targets", "strategies.sparse_to_sparse"]
TOP = [module.name for module in pkgutil.iter_modules(lightning_sparse.__path__) if not module.name.startswith("_")]
MODULES = sorted({*TOP, *FOR_METHODS} - {"engine", "strategies"})


def write(path, text):
    """Write a page where it has changed, so that Sphinx reads only what is new."""
    path.parent.mkdir(exist_ok=True)
    if not path.exists() or path.read_text("utf-8") != text:
        path.write_text(text, "utf-8")


def page_of_method(method):
    """The card of a method and its docstring."""
    words, card = cards.words(method), cards.card_of(method)
    if card.paper:
        words["paper"] = f"[{card.citation}]({card.address})"
    return f"""# {method.__name__}

{cards.table(["in a few words", ""], words.items())}

Beside its arguments, a method has what all have: `report()`, `mask(name)` and more, see
{{py:class}}`~lightning_sparse.SparseTraining`.

```{{eval-rst}}
.. autoclass:: lightning_sparse.{method.__name__}
```
"""


def page_of_module(name):
    """What a module exports; methods have pages of their own, and SparseTraining is on the first page."""
    elsewhere = [*strategies.__all__, *([] if name == "lightning_sparse" else ["SparseTraining"])]
    shown = [word for word in importlib.import_module(name).__all__ if word not in elsewhere]
    return f"""# {name}

```{{eval-rst}}
.. automodule:: {name}
   :members: {", ".join(shown)}
```
"""


def page_of_notebook(path):
    """Text and code of a notebook, with the notebook itself to download."""
    parts = []
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    title, *rest = parts
    return "\n\n".join([title, f"{{download}}`{path.name} <../../notebooks/{path.name}>`", *rest, ""])


def page_of_methods(methods):
    """A line for each method."""
    lines = [
        f"- [{method.__name__}]({method.__name__}.md): {cards.sections(method)[''].splitlines()[0]}"
        for method in methods
    ]
    toctree = ["```{toctree}", ":hidden:", ":glob:", "", "*", "```"]
    return "\n".join(["# Method by method", "", *map(cards.markdown, lines), "", *toctree, ""])


write(DOCS / "method" / "index.md", page_of_methods(vars(strategies)[name] for name in strategies.__all__))
for method_name in strategies.__all__:
    write(DOCS / "method" / f"{method_name}.md", page_of_method(vars(strategies)[method_name]))
for module_name in ["lightning_sparse", *(f"lightning_sparse.{module}" for module in MODULES)]:
    write(DOCS / "api" / f"{module_name}.md", page_of_module(module_name))
for notebook in (DOCS.parent / "notebooks").glob("*.ipynb"):
    write(DOCS / "notebook" / f"{notebook.stem}.md", page_of_notebook(notebook))


# -- mathematics without scripts and without the network --------------------------------------------------------------


def mathml(tex, *, block):
    """A formula in MathML, which browsers draw by themselves."""
    return tex2mathml(re.sub(r"\\[Bb]igg?(?![A-Za-z])", "", tex), as_block=block)


def visit_math(writer, node):
    """Write a formula in a line."""
    writer.body.append(mathml(node.astext(), block=False))
    raise SkipNode


def visit_displaymath(writer, node):
    """Write a formula of its own."""
    writer.body.append(f'<div class="math" style="overflow-x: auto">{mathml(node.astext(), block=True)}</div>')
    raise SkipNode


def as_github_reads_it(app, name, source):
    """$`x`$ is the form of a formula that GitHub is sure to understand."""
    source[0] = re.sub(r"\$`(.+?)`\$", r"$\1$", source[0], flags=re.DOTALL)


def setup(app):
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_displaymath, None))
    app.connect("source-read", as_github_reads_it)


html_math_renderer = "mathml"
