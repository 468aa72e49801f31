"""Drawing whole training configurations with Hypothesis."""

import functools
from typing import Any, get_args, get_type_hints

from hypothesis import strategies as st

from lightning_sparse.engine.targets import find_targets
from tests.helpers.architectures import ARCHITECTURES
from tests.helpers.strategies import SETTINGS
from tests.helpers.sweep import OPTIMIZERS, PRECISIONS, SCHEDULERS, Config, Subject


@functools.cache
def target_names(architecture: str) -> list[str]:
    """Names of the weights that are treated by default."""
    return [target.name for target in find_targets(Subject(Config(architecture))) if target.treated]


@st.composite
def patterns(draw: Any, names: list[str], budget: bool) -> dict[str, Any]:
    """Arguments that leave at least one weight to treat."""
    kwargs: dict[str, Any] = {}
    kind = draw(st.sampled_from(["default", "default", "default", "names", "glob", "ignore", "overrides"]))
    some = draw(st.lists(st.sampled_from(names), unique=True, min_size=1, max_size=max(1, len(names) - 1)))
    if kind == "names":
        kwargs["targets"] = some
    elif kind == "glob":
        kwargs["targets"] = [draw(st.sampled_from(["net.*", "*weight*", "re:weight", "Module"]))]
        if "net.unused.weight" in names:
            kwargs["targets"] = ["re:weight$"]  # not what a parametrization divides by
    elif kind == "ignore" and len(names) > 1:
        kwargs["ignore"] = some
    elif kind == "overrides" and len(names) > 1:
        settings = st.fixed_dictionaries({"sparsity": st.sampled_from([0.0, 0.25, 0.8, 0.99])})
        kwargs["overrides"] = {name: draw(st.none() | settings if budget else st.none()) for name in some}
    return kwargs


@st.composite
def moments(draw: Any, names: list[str], fractions: int) -> dict[str, Any]:
    """Moments in order, as epochs or, so many times out of ten, as fractions; at times mixed, perhaps to be refused."""
    fraction, epoch = st.sampled_from([0.0, 0.2, 0.34, 0.5, 0.55, 0.75, 1.0]), st.integers(0, 2)
    kind, other = (fraction, epoch) if draw(st.integers(0, 9)) < fractions else (epoch, fraction)
    values = sorted(draw(st.tuples(*[kind] * len(names))))
    if names and draw(st.integers(0, 11)) == 0:
        values[0] = draw(other)
    return dict(zip(names, values, strict=True))


@st.composite
def arguments(draw: Any, strategy: str, names: list[str], fractions: int) -> dict[str, Any]:
    """Arguments of a strategy."""
    method, kwargs = SETTINGS[strategy].method, {}
    codes = method.__init__.__code__
    known = {*codes.co_varnames[: codes.co_argcount + codes.co_kwonlyargcount]}
    budget = SETTINGS[strategy].sparsity is not None and "sparsity" in known
    most = 1.0 - SETTINGS[strategy].kwargs.get("minimum_density", 0.0)
    if budget:
        kwargs["sparsity"] = draw(st.sampled_from([s for s in (0.0, 0.1, 0.5, 0.7, 0.9, 0.95, 0.99) if s < most]))
        always = getattr(SETTINGS[strategy].build(), "freeze", None) is not None and "freeze" in known
        freeze = ["freeze"] if always or ("freeze" in known and draw(st.booleans())) else []
        named = [name for name in ("start", "end", "finetune") if name in known]
        kwargs |= draw(moments([*named, *freeze], fractions))
        if strategy == "ST3-freeze" and "freeze" not in kwargs:
            kwargs["freeze"] = kwargs["end"]
    # Pruned weights of a method without latents do not come back, so that its ramp never falls.
    shapes = ["cubic", "linear", "cosine", "constant", "staircase", *(["detour"] if method.keeps_latent else [])]
    choices: dict[str, st.SearchStrategy[Any]] = {
        "initial_sparsity": st.sampled_from([0.0, 0.05]).filter(lambda s: s <= kwargs["sparsity"]),
        "schedule": st.sampled_from(shapes),
        "distribution": st.sampled_from(
            # Budgets that follow the weights, or that a minimum changes, are not known beforehand.
            [
                share
                for share in get_args(get_type_hints(method.__init__).get("distribution"))
                if share != "lamp" and (most == 1.0 or share in ("global", "uniform"))
            ]
            or ["global"]
        ),
        "projection": st.sampled_from(["hard", "soft"]),
        "gradient": st.sampled_from(["straight_through", "masked"]),
        "update_every_n_steps": st.integers(1, 4),
        "rescale": st.booleans(),
        "threshold_init": st.sampled_from([-4.0, -3.0, -2.0]),
        "threshold_weight_decay": st.sampled_from([0.0, 0.01, 0.1]),
        "alpha": st.sampled_from([0.0, 0.3, 1.0]),
        "alpha_reset": st.sampled_from([None, 0.5, 1]),
        "alpha_in_threshold": st.booleans(),
        "backward_sparsity": st.sampled_from([None, 0.4]),
        "power": st.sampled_from([1.0, 1.5, 2.0]),
        "exploration_loss": st.sampled_from([0.0, 0.01]),
        "drop_threshold": st.sampled_from([0.0, 0.1, 100.0]),
        "l1": st.sampled_from([0.0, 1.0]),
        "noise": st.sampled_from([0.0, 1.0]),
        "beta": st.sampled_from([0.0, 0.5, 4.0]),
        "threshold": st.sampled_from([0.01, 0.2]),
        "zeros": st.sampled_from([0.1, 0.9]),
        "masked_decay": st.sampled_from([0.0, 0.05]),
        "drop_fraction": st.sampled_from([0.0, 0.3, 0.6]),
        "score_lr": st.sampled_from([0.01, 0.1]),
        "sharpness": st.sampled_from([5.0, 20.0]),
        "kl_weight": st.sampled_from([0.0, 1e-3]),
        "rewind": st.sampled_from([None, "learning_rate", "weights"]),
        "reset_optimizer_state": st.booleans(),
    }
    choices = {name: choice for name, choice in choices.items() if name in known and (budget or name != "gradient")}
    for name in draw(st.lists(st.sampled_from(sorted(choices)), unique=True, max_size=4)):
        kwargs[name] = draw(choices[name])
    return kwargs | draw(patterns(names, budget and most == 1.0))


@st.composite
def configs(draw: Any, *, compiled: bool, openended: bool, resumable: bool) -> Config:
    """A whole training configuration."""
    architecture = draw(st.sampled_from(sorted(ARCHITECTURES)))
    # A pattern may fit none of the layers.
    strategy = draw(st.sampled_from(sorted(name for name, row in SETTINGS.items() if "pattern" not in row.kwargs)))
    epochs, steps = draw(st.sampled_from([(1, -1), (2, -1), (3, -1), (-1, 8), (3, 8), (-1, -1)]))
    # Which is refused in an open-ended training.
    annealed = any(hasattr(SETTINGS[strategy].build(), name) for name in ("alpha", "finetune"))
    if epochs == steps == -1 and (not openended or annealed or draw(st.booleans())):
        epochs = 2
    if steps > 0:
        steps = draw(st.integers(1, steps))
    sized = (resumable and (epochs == -1 or steps > 0)) or draw(st.integers(0, 3)) < 3
    fractions = 1 if epochs == steps == -1 else 7 if sized or steps == -1 else 9
    kwargs = draw(arguments(strategy, target_names(architecture), fractions))
    backend = draw(st.sampled_from([None] * 60 + ["eager", "aot_eager"])) if compiled else None
    optimizer, precision = draw(st.sampled_from(sorted(OPTIMIZERS))), draw(st.sampled_from(PRECISIONS))
    clips = [("norm", 0.1), ("value", 0.01)]
    if (optimizer, precision) == ("adam-fused", "bf16-mixed"):
        clips = [None]  # Lightning refuses to clip there
    return Config(
        architecture=architecture,
        strategy=strategy,
        kwargs=kwargs,
        optimizer=optimizer,
        groups=draw(st.booleans()),
        scheduler=draw(st.sampled_from([None, *SCHEDULERS])),
        precision=precision,
        accumulate=draw(st.sampled_from([1, 1, 2, 3])),
        clip=draw(st.sampled_from([None, None, *clips])),
        manual=draw(st.sampled_from([0, 0, 0, 1, 2])),
        compiled=backend,
        channels_last=architecture != "odd" and draw(st.sampled_from([False, False, True])),  # not in 3D
        batches=draw(st.integers(1, 4)),
        sized=sized,
        epochs=epochs,
        steps=steps,
        validate=draw(st.sampled_from([0, 0, None, 2])),
        # Where FLOPs are counted in the first batch, that one runs eagerly.
        example=bool(backend) or draw(st.booleans()),
    )
