"""What a method is in a few words, and the lists and pages that are made of these words."""

import inspect
import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["Card", "fill", "line", "parts", "sheet"]


@dataclass(frozen=True, kw_only=True)
class Card:
    """A method in the words of the table of methods. Where a word is missing it is that of gradual pruning.

    Attributes:
        paper: Authors, venue and address; empty if there is none.
        criterion: Which weights live.
        projection: What the network sees of them.
        gradient: What trains the latents.
        schedule: How the sparsity comes about.
        allocation: How the budget is split between the layers; empty for what the argument `distribution` offers.
        dense_gradient: When the gradient of pruned weights has to be computed; "never", "always" or another word.
        training_flops: FLOPs of a training step, of those of a forward pass: `f_S` sparse, `f_D` dense.
        published: Accuracies that the authors give: network and data, sparsity, in brackets where they stand.

    Example:
        >>> card = Card(paper="Zhu and Gupta, 2017, https://arxiv.org/abs/1710.01878", criterion="the largest")
        >>> card.citation, card.projection, card.training_flops
        ('Zhu and Gupta, 2017', 'mask', '3 f_S')
    """

    paper: str = ""
    criterion: str = ""
    projection: str = "mask"
    gradient: str = "gradient of the kept weights"
    schedule: str = "cubic ramp, to the weight"
    allocation: str = ""
    dense_gradient: str = "never"
    training_flops: str = "3 f_S"
    published: str = ""

    @property
    def citation(self) -> str:
        """Authors and venue."""
        return self.paper.partition(", https://")[0]

    @property
    def address(self) -> str:
        """Where the paper is."""
        return self.paper[len(self.citation) + 2 :]


# -- what a class says about itself -----------------------------------------------------------------------------------


def card_of(method: type) -> Card:
    """The card of a class, which it may inherit, or an empty one."""
    card = getattr(method, "card", None)
    return card if isinstance(card, Card) else Card()


def sections(method: type) -> dict[str, str]:
    """The docstring by the titles of its sections; the text before them under ``""``."""
    text = inspect.cleandoc(method.__doc__ or "")
    head, *rest = re.split(r"^(\w+):\n", text, flags=re.MULTILINE)
    named = dict(zip(rest[::2], rest[1::2], strict=True))
    return {title: inspect.cleandoc(f"\n{body}").strip() for title, body in {"": head, **named}.items()}


def allocation(method: type) -> str:
    """The card's word, or the choices of the argument ``distribution``, the default first."""
    argument = inspect.signature(method, eval_str=True).parameters.get("distribution")
    if card_of(method).allocation or argument is None:
        return card_of(method).allocation
    choices = re.findall(r"'(\w+)'", str(argument.annotation))
    return ", ".join(dict.fromkeys([str(argument.default), *choices]))


def words(method: type) -> dict[str, str]:
    """All words of a method by their titles."""
    card = card_of(method)
    return {
        "paper": card.paper or "none",
        "which weights live": card.criterion,
        "what the network sees": card.projection,
        "what trains them": card.gradient,
        "sparsity": card.schedule,
        "budget of the layers": allocation(method),
        "dense gradient": card.dense_gradient,
        "training FLOPs per step": card.training_flops,
        "published": card.published or "no figures that could be checked",
    }


# -- text -------------------------------------------------------------------------------------------------------------


def line(method: type, width: int = 0) -> str:
    """Name, what it does and paper, on one line."""
    summary, citation = sections(method)[""].partition("\n")[0], card_of(method).citation
    return f"{method.__name__:{width}}  {summary}{f' ({citation})' if citation else ''}"


def sheet(method: type) -> str:
    """The whole card."""
    rows = words(method)
    width = max(map(len, rows))
    text = [line(method), "", *(f"  {title:{width}}  {word}" for title, word in rows.items())]
    if note := plain(sections(method).get("Note", "")):
        text += ["", textwrap.fill(note, 100, initial_indent="  ", subsequent_indent="  ")]
    return "\n".join(text)


def plain(text: str) -> str:
    """Docstring text without markup."""
    text = re.sub(r":(?:class|func|meth):`~?([\w.]+)`", lambda match: match[1].rpartition(".")[2], text)
    return re.sub(r":math:`(.+?)`", r"\1", text, flags=re.DOTALL).replace("``", "`")


# -- markdown ---------------------------------------------------------------------------------------------------------


def markdown(text: str) -> str:
    """Docstring text as GitHub reads it."""
    text = re.sub(r":(?:class|func|meth):`~?([\w.]+)`", lambda match: f"`{match[1].rpartition('.')[2]}`", text)
    text = re.sub(r":math:`(.+?)`", r"$`\1`$", text, flags=re.DOTALL).replace("``", "`")
    text = re.sub(r"^\.\. math:: (.+)$", r"```math\n\1\n```", text, flags=re.MULTILINE)

    def block(match: re.Match[str]) -> str:
        return f"```math\n{textwrap.dedent(match[1]).strip()}\n```\n"

    return re.sub(r"^\.\. math::\n((?: +.+\n?)+)", block, text, flags=re.MULTILINE)


def table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table."""
    titles = list(titles)
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in lines)


def short_table(methods: Iterable[type], page: str) -> str:
    """What a newcomer wants to know: a row per method, which links to the section on a page."""
    titles = ("which weights live", "what trains them", "sparsity")
    rows = [[f"[`{m.__name__}`]({page}#{m.__name__.lower()})", *(words(m)[t] for t in titles)] for m in methods]
    return table(["method", *titles], rows)


def overview(methods: Iterable[type]) -> str:
    """Where the methods come from and what they cost."""
    titles = ("budget of the layers", "dense gradient", "training FLOPs per step")
    rows = []
    for method in methods:
        card, word = card_of(method), words(method)
        paper = f"[{card.citation}]({card.address})" if card.paper else "–"
        rows.append([f"[`{method.__name__}`](#{method.__name__.lower()})", paper, *(word[title] for title in titles)])
    return table(["method", "paper", *titles], rows)


def section(method: type) -> str:
    """All about a method."""
    text = sections(method)
    body = re.sub(r"\n*^Takes the arguments of .*?\.$", "", markdown(text[""]), flags=re.MULTILINE).strip()
    lines = [f"### {method.__name__}", "", body, ""]
    lines += [f"- **{title[0].upper()}{title[1:]}:** {word}" for title, word in words(method).items()]
    if note := text.get("Note"):
        lines += ["", f"*What differs, and what to know:* {markdown(note)}"]
    return "\n".join(lines)


def parts(methods: Iterable[type]) -> dict[str, str]:
    """The generated parts of the docs by their names."""
    methods = list(methods)
    return {
        "short table of methods": short_table(methods, "docs/methods.md"),
        "overview of methods": overview(methods),
        "sections of methods": "\n\n".join(map(section, methods)),
    }


def fill(text: str, parts: Mapping[str, str]) -> str:
    """Replace what lies between ``<!-- NAME -->`` and ``<!-- end of NAME -->`` by the part of that name.

    Raises:
        ValueError: If the text has the markers of none of the parts.

    Example:
        >>> print(fill("<!-- a -->old<!-- end of a -->", {"a": "new", "b": "not asked for"}))
        <!-- a -->
        <BLANKLINE>
        new
        <BLANKLINE>
        <!-- end of a -->
    """
    found = False
    for name, part in parts.items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if start in text and end in text:
            before, rest = text.split(start, 1)
            text, found = f"{before}{start}\n\n{part}\n\n{end}{rest.split(end, 1)[1]}", True
    if not found:
        raise ValueError(f"Expected markers `<!-- NAME -->` and `<!-- end of NAME -->` of one of {list(parts)}.")
    return text
