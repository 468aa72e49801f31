"""Train ResNet-20 on CIFAR-10 with any methods, sparsities and seeds by one recipe, and compare the accuracies.

    export CIFAR10_JPEG=~/data/cifar-10-batches-py                  # or --data, see examples/cifar10.py
    python benchmarks/accuracy.py --output docs/accuracy.md         # trains what is not in --lines, then shows all
    python benchmarks/accuracy.py --output docs/accuracy.md --show  # table and picture of --lines, no training

Every finished run is one line of JSON in `--lines`. Method, sparsity, seed and recipe tell whether a run is there
already, so that an interrupted sweep goes on where it stopped, and more methods or seeds join what has been measured.
Who changes the arguments of a method below deletes its lines.

The accuracy is that of the model at the end of training; no epoch is selected. The sparsity is counted in that model.
"""

import argparse
import inspect
import itertools
import json
import logging
import sys
import time
import warnings
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import lightning as L
import torch
from matplotlib.figure import Figure
from tables import processor, publish, table

from lightning_sparse import strategies
from lightning_sparse.flops import count_flops
from lightning_sparse.functional import sparsity as zeros

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from cifar10 import Cifar10, Classifier

# What a method is given beyond its sparsity and the seed; moments are fractions of training. A method without a
# `sparsity` of its own has arguments per sparsity, found by short trials, and ends near it. A strategy of the package
# that is not listed runs with its defaults.
ARGUMENTS = {
    "dense": {},
    "ST3": {"start": 0.05, "end": 0.5},
    "GMP": {"start": 0.05, "end": 0.5, "update_every_n_steps": 100},
    "SET": {"end": 0.75, "update_every_n_steps": 100, "drop_fraction": 0.3},
    "AutoSparse": {"start": 0.05, "end": 0.5},
    "RigL": {"end": 0.75, "update_every_n_steps": 100, "drop_fraction": 0.3},
    "TopKGradientAnnealing": {"alpha": 0.5, "alpha_reset": 0.9},
    "ST3Sigma": {"start": 0.05, "end": 0.5},
    "STR": {
        0.9: {"threshold_init": -8.0, "threshold_weight_decay": 4.6e-3},
        0.95: {"threshold_init": -8.0, "threshold_weight_decay": 7.2e-3},
    },
    "TopKAST": {"backward_sparsity": 0.5, "update_every_n_steps": 100},
    "MEST": {
        0.9: {"mutation": {0.0: 0.02, 0.5625: 0.01, 0.75: 0.0}, "update_every_n_steps": 100},
        0.95: {"mutation": {0.0: 0.01, 0.5625: 0.005, 0.75: 0.0}, "update_every_n_steps": 100},
    },
}
AXES = {
    "sparsity_counted": "sparsity [%]",
    "inference_flops_ratio": "inference FLOPs [% of dense]",
    "training_flops_ratio": "training FLOPs [% of dense]",
}
MEANS = [*AXES, "test_accuracy", "val_accuracy", "seconds"]
COLORS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"]  # Okabe and Ito
STYLES = [(color, marker) for marker in "o^sD" for color in COLORS]


class Model(Classifier):
    """The classifier of the example with a learning rate that rises once and falls again, step by step."""

    def configure_optimizers(self):
        [optimizer], _ = super().configure_optimizers()
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams.lr, steps, cycle_momentum=False)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def arguments_of(method, sparsity):
    """What the table above says about a method."""
    given = ARGUMENTS.get(method, {})
    if not any(isinstance(name, float) for name in given):
        return given
    if sparsity not in given:
        raise SystemExit(
            f"ARGUMENTS says what {method} needs for {', '.join(map(str, given))}, but not for {sparsity}."
        )
    return given[sparsity]


def strategy(method, sparsity, seed, given):
    """The callbacks of a run."""
    if method == "dense":
        return []
    cls = getattr(strategies, method)
    common = {"sparsity": sparsity, "seed": seed}
    common = {name: common[name] for name in inspect.signature(cls).parameters if name in common}
    return [cls(verbose=False, **common, **given)]


def train(method, sparsity, seed, recipe, data):
    """One run: what becomes a line."""
    L.seed_everything(seed, verbose=False)
    given, model = arguments_of(method, sparsity), Model(lr=recipe["lr"])
    trainer = L.Trainer(
        max_epochs=recipe["epochs"],
        precision=recipe["precision"],
        gradient_clip_val=recipe["clip"],
        callbacks=strategy(method, sparsity, seed, given),
        check_val_every_n_epoch=recipe["epochs"],
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.fit(model, data)
    seconds = time.perf_counter() - start
    logged = {"flops/training_ratio": 1.0} | {name: float(value) for name, value in trainer.callback_metrics.items()}
    [tested] = trainer.test(model, data, verbose=False)
    flops = count_flops(model, torch.zeros(1, 3, 32, 32, device=model.device))
    return {
        **{"method": method, "sparsity": sparsity, "seed": seed, "recipe": recipe, "arguments": given},
        "sparsity_counted": zeros(weight for weight in model.parameters() if weight.ndim > 1),
        "inference_flops_ratio": flops.sparse / flops.dense,
        "training_flops_ratio": logged["flops/training_ratio"],
        "test_accuracy": tested["test_accuracy"],
        "val_accuracy": logged["val_accuracy"],
        "seconds": round(seconds, 1),
        "data": "CIFAR-10 (JPEG)" if Path(data.path).is_file() else "CIFAR-10",
        "machine": machine(),
        "torch": torch.__version__,
    }


def machine():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{processor()}, {torch.get_num_threads()} thread(s)"


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def sweep(args, recipe):
    """Train what is asked for and not yet among the lines."""
    wanted = itertools.product(args.seeds, args.sparsities, args.methods)
    runs = dict.fromkeys((method, 0.0 if method == "dense" else share, seed) for seed, share, method in wanted)
    data = Cifar10(args.data, recipe["batch"])
    for run in runs:
        done = [[line[name] for name in ("method", "sparsity", "seed", "recipe")] for line in read(args.lines)]
        if [*run, recipe] in done:
            continue
        data.setup("fit")  # reads and decodes once for all runs, not in their time
        line = train(*run, recipe, data)
        with args.lines.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(*run, f"{line['sparsity_counted']:.2%} {line['test_accuracy']:.2%} {line['seconds']:.0f} s", flush=True)


def over_seeds(lines):
    """Recipe to the means of the runs that differ in nothing but the seed; sparsest last, most accurate first."""
    groups = defaultdict(list)
    for line in lines:
        recipe = ", ".join(f"{name} {value}" for name, value in line["recipe"].items())
        groups[recipe, line["sparsity"], line["method"]].append(line)
    recipes = defaultdict(list)
    for (recipe, _, _), runs in groups.items():
        result = runs[0] | {name: mean(run[name] for run in runs) for name in MEANS}
        accuracies = [run["test_accuracy"] for run in runs]
        recipes[recipe].append(result | {"seeds": len(runs), "spread": stdev(accuracies) if len(runs) > 1 else 0.0})
    for results in recipes.values():
        results.sort(key=lambda result: (result["sparsity"], -result["test_accuracy"]))
    return recipes


def row(result):
    """A line of the table."""
    spread = f" ± {result['spread']:.2%}" if result["seeds"] > 1 else ""
    given = ", ".join(f"{name}={value}" for name, value in result["arguments"].items())
    return [
        *(result["method"], f"{result['sparsity']:.0%}", f"{result['sparsity_counted']:.2%}"),
        *(f"{result['test_accuracy']:.2%}{spread}", f"{result['val_accuracy']:.2%}"),
        *(f"{result['inference_flops_ratio']:.3f}", f"{result['training_flops_ratio']:.3f}"),
        *(f"{result['seconds'] / 60:.1f}", result["seeds"], given),
    ]


def show(lines, output):
    """Print the tables; write them to a file, and a picture beside it, if there is a file."""
    recipes = over_seeds(lines)
    titles = ["method", "asked", "sparsity", "test accuracy", "validation", "inference FLOPs", "training FLOPs"]
    titles += ["minutes", "seeds", "arguments"]
    parts = [f"ResNet-20 on {' and '.join(sorted({line['data'] for line in lines}))}, of each run the last model."]
    parts += [f"Recipe: {recipe}.\n\n{table(titles, map(row, results))}" for recipe, results in recipes.items()]
    machines = "; ".join(sorted({f"{line['machine']}, torch {line['torch']}" for line in lines}))
    parts.append(f"FLOPs are theoretical and relative to dense. Trained on {machines}.")
    if output:
        picture = output.with_suffix(".png")
        draw(recipes, picture)
        parts.append(f"![Accuracy over sparsity and FLOPs]({picture.name})")
    publish("How accurate the sparse models are", "\n\n".join(parts), output)


def draw(recipes, path):
    """One row of panels per recipe."""
    styles = defaultdict(itertools.cycle(STYLES).__next__)
    figure = Figure(figsize=(12, 4.5 * len(recipes) + 1), layout="constrained")
    panels = figure.subplots(len(recipes), len(AXES), squeeze=False)
    for line, (recipe, results) in zip(panels, recipes.items(), strict=True):
        for axes, (name, title) in zip(line, AXES.items(), strict=True):
            for result in results:
                accuracy = 100 * result["test_accuracy"]
                if result["method"] == "dense":
                    axes.axhline(accuracy, color="black", linewidth=1, label="dense")
                    continue
                color, marker = styles[result["method"]]
                point = 100 * result[name], accuracy, 100 * result["spread"]
                axes.errorbar(*point, color=color, marker=marker, capsize=3, linestyle="", label=result["method"])
            axes.set_xlabel(title)
            axes.ticklabel_format(useOffset=False)
            low, high = axes.get_xlim()
            axes.set_xlim(min(low, high - 2), max(high, low + 2))
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.3)
        line[0].set_ylabel("test accuracy [%]")
        line[0].set_title(recipe, loc="left")  # may be wider than its panel
    handles = {}
    for axes in panels.flat:
        shown, names = axes.get_legend_handles_labels()
        handles.update(zip(names, shown, strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(path, dpi=110)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = ["dense", *strategies.__all__]
    parser.add_argument("--methods", nargs="+", choices=choices, default=list(ARGUMENTS), metavar="METHOD")
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.9, 0.95])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--data", help="CIFAR-10, if the environment variable CIFAR10_JPEG does not say where")
    parser.add_argument("--lines", type=Path, default=Path("docs/accuracy.jsonl"), help="file of the finished runs")
    parser.add_argument("--output", type=Path, help="markdown file to write the table to; the picture goes beside it")
    parser.add_argument("--show", action="store_true", help="train nothing")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1, help="highest learning rate, as in ST-3's recipes")
    parser.add_argument("--clip", type=float, default=3.0, help="largest norm of the gradient, as in ST-3's recipes")
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="1 where other programs run, too")
    args = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*LeafSpec|.*does not have many workers")
    torch.set_num_threads(args.threads)
    if not args.show:
        sweep(args, {name: getattr(args, name) for name in ("epochs", "batch", "lr", "clip", "precision")})
    show(read(args.lines), args.output)


if __name__ == "__main__":
    main()
