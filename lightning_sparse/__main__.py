"""The command line: ``lightning-sparse``, or ``python -m lightning_sparse``."""

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_sparse._commands import COMMANDS, methods

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["main"]


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
    sys.path.insert(0, os.getcwd())  # where classes like `my_package.Model` are found, as they are by `python -m`
    try:
        if training:
            from lightning_sparse._fit import Fit

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
