"""The command line: ``lightning-sparse``, or ``python -m lightning_sparse``."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_sparse import cards, strategies
from lightning_sparse.export import inspect_checkpoint

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["main"]


def methods(name: str | None, fill: Sequence[Path]) -> None:
    """List the methods, one per line, or show all about one."""
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
    """Count the zeros in anybody's checkpoint; nothing in it is run.

    Args:
        checkpoint: Of Lightning, a state dict of torch.save, or safetensors, packed or not.
    """
    print(inspect_checkpoint(checkpoint))


# In the order of the help. The arguments of a command are those of its function, in the words of its docstring.
COMMANDS: dict[str, Callable[..., None]] = {"methods": methods, "inspect": inspect}


def make_parser() -> "ArgumentParser":
    """One subcommand for each function of COMMANDS, and ``fit``, which LightningCLI parses."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="lightning-sparse", description="Sparse training for PyTorch Lightning.")
    commands = parser.add_subcommands(dest="command")
    commands.add_subcommand("fit", ArgumentParser(), help="Train any model with any method, by LightningCLI.")
    for name, function in COMMANDS.items():
        summary = (function.__doc__ or "").partition("\n")[0]
        command = ArgumentParser(description=summary)
        if function is methods:  # an optional argument without dashes, and several files, take words of their own
            command.add_argument("name", metavar="NAME", nargs="?", help="the method to show")
            fill = "instead write the tables of all methods between their markers in documents, as `make docs` does"
            command.add_argument("--fill", metavar="FILE", type=Path, nargs="+", default=[], help=fill)
        else:
            command.add_function_arguments(function, as_group=False, as_positional=True)
        commands.add_subcommand(name, command, help=summary)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; what the user got wrong ends in a sentence and exit code 2."""
    try:
        parser = make_parser()
    except ModuleNotFoundError:
        sys.exit("The command line needs jsonargparse: pip install 'lightning-sparse[cli]'")
    words = sys.argv[1:] if arguments is None else arguments
    training = list(words[:1]) == ["fit"]
    try:
        if training:
            from lightning_sparse._fit import Fit

            sys.path.insert(0, os.getcwd())  # where `--model module.Class` is found, as it is by `python -m`
            Fit(arguments)
        else:
            chosen = parser.parse_args(arguments)
            COMMANDS[chosen.command](**vars(chosen[chosen.command]))
    except (MisconfigurationException, ModuleNotFoundError, OSError, ValueError) as error:
        if training and not is_answer(error):
            raise
        parser.error(str(error))


def is_answer(error: BaseException) -> bool:
    """Whether an error tells what is wrong with the arguments, in contrast to one in the user's own code."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals["__name__"].partition(".")[0] in ("jsonargparse", "lightning", "lightning_sparse")


if __name__ == "__main__":
    main()
