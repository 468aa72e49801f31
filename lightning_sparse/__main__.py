"""The command line: ``lightning-sparse``, or ``python -m lightning_sparse``."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_sparse import cards, strategies
from lightning_sparse.export import inspect_checkpoint

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["main"]


def methods(name: str | None, fill: Sequence[Path]) -> None:
    """List the methods, show one, or write the generated parts of documents."""
    known = {method: vars(strategies)[method] for method in strategies.__all__}
    if name is not None and name not in known:
        raise ValueError(f"Expected argument `NAME` to be one of {', '.join(known)}, but got {name!r}.")
    for path in fill:
        try:
            text = cards.fill(path.read_text("utf-8"), cards.parts(known.values()))
        except ValueError as error:
            raise ValueError(f"`{path}`: {error}") from error
        path.write_text(text, "utf-8")
    if name is not None:
        print(cards.sheet(known[name]))
    elif not fill:
        print("\n".join(cards.line(method, max(map(len, known))) for method in known.values()))


def inspect(checkpoint: Path) -> None:
    """Tell how sparse the weights in a file are."""
    print(inspect_checkpoint(checkpoint))


COMMANDS: dict[str, Callable[..., None]] = {"inspect": inspect, "methods": methods}


def make_parser() -> "ArgumentParser":
    """One subcommand for each function of COMMANDS, which is called with what it has read."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="lightning-sparse", description="Sparse training for PyTorch Lightning.")
    commands = parser.add_subcommands(dest="command")
    listing = ArgumentParser(description="List the methods, one per line, or show all about one.")
    listing.add_argument("name", metavar="NAME", nargs="?", help="the method to show")
    listing.add_argument(
        "--fill",
        metavar="FILE",
        type=Path,
        nargs="+",
        default=[],
        help="instead write the tables of all methods between their markers in documents, as `make docs` does",
    )
    commands.add_subcommand("methods", listing, help="what there is to choose from")
    inspection = ArgumentParser(description="Count the zeros in anybody's checkpoint; nothing in it is run.")
    inspection.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=Path, help="of Lightning, a state dict of torch.save, or safetensors"
    )
    commands.add_subcommand("inspect", inspection, help="how sparse the weights in a file are")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; what the user got wrong ends in a sentence and exit code 2."""
    try:
        parser = make_parser()
    except ModuleNotFoundError:
        sys.exit("The command line needs jsonargparse: pip install 'lightning-sparse[cli]'")
    chosen = parser.parse_args(arguments)
    try:
        COMMANDS[chosen.command](**vars(chosen[chosen.command]))
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
