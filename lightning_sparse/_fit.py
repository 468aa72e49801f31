"""``lightning-sparse fit``; apart from the other commands because it needs jsonargparse to be imported."""

from collections.abc import Sequence

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_sparse.engine.budgets import BudgetedTraining

__all__ = ["Fit"]

DESCRIPTION = """Train any model with any method: all arguments of LightningCLI, and `--method`. For example

lightning-sparse fit --model package.Model --data package.Data --method ST3 --method.sparsity 0.9

`lightning-sparse methods` lists the methods, `lightning-sparse fit --method.help ST3` the arguments of one."""


class Fit(LightningCLI):
    """LightningCLI for any model, data and method, with the command ``fit`` alone.

    Args:
        args: ``["fit", ...]``; None for those of the command line.
    """

    def __init__(self, args: Sequence[str] | None = None) -> None:
        super().__init__(
            args=None if args is None else list(args),
            parser_kwargs={"prog": "lightning-sparse", "fit": {"description": DESCRIPTION}},
            save_config_kwargs={"overwrite": True},
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """``fit``, without what the other arguments give already."""
        return {"fit": LightningCLI.subcommands()["fit"]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """``--method ST3 --method.sparsity 0.9``; without, the model trains dense."""
        # The base is one that takes no arguments, so that arguments before the name of the method are refused. From a
        # base that took them, its other defaults would be carried over to the method.
        parser.add_lightning_class_args(BudgetedTraining, "method", subclass_mode=True, required=False)

    def before_instantiate_classes(self) -> None:
        """Leave a method that is not asked for out of the callbacks."""
        if self.config.fit.method is None:
            self._parser("fit").callback_keys.remove("method")
