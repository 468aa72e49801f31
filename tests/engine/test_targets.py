"""Which parameters are made sparse, by default and by pattern, and the reason given for every other one."""

import re

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrizations, prune

from lightning_sparse.engine.targets import find_targets


def treated(module, **patterns):
    return [verdict.name for verdict in find_targets(module, **patterns) if verdict.treated]


def reasons(module, **patterns):
    return {verdict.name: verdict.reason for verdict in find_targets(module, **patterns)}


def refuse(message, module, **patterns):
    with pytest.raises(ValueError, match=re.escape(message)):
        find_targets(module, **patterns)


@pytest.fixture
def net():
    """Two stages of a convolution and a norm each, and a head."""
    stages = [nn.ModuleDict({"conv": nn.Conv2d(2, 2, 3), "norm": nn.BatchNorm2d(2)}) for _ in range(2)]
    return nn.ModuleDict({"stages": nn.ModuleList(stages), "head": nn.Linear(8, 2)})


CONVS = ["stages.0.conv.weight", "stages.1.conv.weight"]


# --- by default ------------------------------------------------------------------------------------------------------

LSTM_NAMES = [f"weight_{kind}_l0{end}" for end in ("", "_reverse") for kind in ("ih", "hh", "hr")]


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Linear(3, 4), ["weight"]),
        (nn.Conv1d(2, 4, 3), ["weight"]),
        (nn.Conv2d(2, 4, 3, groups=2), ["weight"]),
        (nn.Conv3d(2, 4, 3), ["weight"]),
        (nn.ConvTranspose1d(2, 4, 3), ["weight"]),
        (nn.ConvTranspose2d(2, 4, 3), ["weight"]),
        (nn.ConvTranspose3d(2, 4, 3), ["weight"]),
        (nn.Bilinear(2, 3, 4), ["weight"]),
        (transformers.pytorch_utils.Conv1D(4, 3), ["weight"]),
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), ["in_proj_weight", "out_proj.weight"]),
        (
            nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
            ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"],
        ),
        (nn.RNN(2, 3), ["weight_ih_l0", "weight_hh_l0"]),
        (nn.GRU(2, 3, num_layers=2), ["weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "weight_hh_l1"]),
        (nn.LSTM(2, 4, proj_size=3, bidirectional=True), LSTM_NAMES),
        (nn.RNNCell(2, 3), ["weight_ih", "weight_hh"]),
        (nn.LSTMCell(2, 3), ["weight_ih", "weight_hh"]),
        (nn.GRUCell(2, 3), ["weight_ih", "weight_hh"]),
        (nn.Embedding(3, 4), []),
        (nn.EmbeddingBag(3, 4), []),
        (nn.LayerNorm((3, 4)), []),
        (nn.BatchNorm2d(3), []),
        (nn.PReLU(3), []),
        (nn.ParameterList([torch.zeros(3, 4)]), []),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_default_selection(layer, expected):
    assert treated(layer) == expected


def test_subclasses_of_the_layers_are_treated():
    class Standardized(nn.Conv2d):
        pass

    assert reasons(Standardized(1, 1, 3)) == {"weight": "Standardized", "bias": "fewer than 2 dimensions"}


def test_every_parameter_gets_one_verdict_in_order(net):
    assert [verdict.name for verdict in find_targets(net)] == [name for name, _ in net.named_parameters()]
    assert all(verdict.parameter is net.get_parameter(verdict.path) for verdict in find_targets(net))


def test_reasons():
    net = nn.ModuleDict(
        {
            "embedding": nn.Embedding(5, 4),
            "attention": nn.MultiheadAttention(4, 2, bias=False, add_bias_kv=True),
            "frozen": nn.Linear(4, 4, bias=False).requires_grad_(False),
            "norm": nn.LayerNorm(4, bias=False),
            "ignored": nn.Linear(4, 4, bias=False),
            "overridden": nn.Linear(4, 4, bias=False),
        }
    )
    assert reasons(net, ignore=["ignored"], overrides={"overr*": None}) == {
        "embedding.weight": "Embedding stays dense by default",
        "attention.in_proj_weight": "MultiheadAttention",
        "attention.bias_k": "bias_k stays dense by default",
        "attention.bias_v": "bias_v stays dense by default",
        "attention.out_proj.weight": "NonDynamicallyQuantizableLinear",
        "frozen.weight": "frozen",
        "norm.weight": "fewer than 2 dimensions",
        "ignored.weight": "in `ignore`",
        "overridden.weight": "dense by `overrides['overr*']`",
    }
    assert reasons(net, targets=["norm"])["embedding.weight"] == "not in `targets`"


def test_integers_and_complex_numbers_stay_dense():
    layer = nn.Linear(2, 2, bias=False)
    layer.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    assert reasons(layer) == {"weight": "not floating point"}
    assert reasons(nn.Conv1d(1, 1, 1, bias=False, dtype=torch.cfloat)) == {"weight": "not floating point"}


def test_uninitialised_parameters_whatever_the_patterns():
    expected = {"weight": "not initialised", "bias": "not initialised"}
    assert reasons(nn.LazyLinear(4)) == reasons(nn.LazyLinear(4), targets=["weight"]) == expected


def test_parametrized_weights_stay_dense_unless_named():
    layer = parametrizations.weight_norm(nn.Linear(3, 4))
    direction = "parametrizations.weight.original1"
    assert reasons(layer)[direction] == "ParametrizationList stays dense by default"
    assert treated(layer, targets=[direction]) == [direction]


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("function", "names"), [(nn.utils.weight_norm, {"weight_g", "weight_v"}), (prune.identity, {"weight_orig"})]
)
def test_reparametrized_weights_of_the_old_kind_stay_dense(function, names):
    layer = function(nn.Linear(3, 4, bias=False), "weight")
    assert reasons(layer) == {name: f"{name} stays dense by default" for name in names}


# --- tied weights ----------------------------------------------------------------------------------------------------


def tied(first, second):
    net = nn.ModuleDict({"a": first, "b": second})
    net["b"].weight = net["a"].weight
    return net


def test_tied_weights_are_treated_once():
    net = tied(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    assert reasons(net) == {"a.weight": "Linear (tied to b.weight)"}
    assert treated(net) == ["a.weight"]


def test_a_module_used_twice_is_treated_once():
    layer = nn.Linear(4, 4, bias=False)
    assert treated(nn.Sequential(layer, nn.ReLU(), layer)) == ["0.weight"]


@pytest.mark.parametrize(
    "layers", [(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)), (nn.Linear(4, 5, bias=False), nn.Embedding(5, 4))]
)
def test_weights_tied_to_an_embedding_stay_dense_unless_named(layers):
    net = tied(*layers)
    assert reasons(net) == {"a.weight": "Embedding stays dense by default (tied to b.weight)"}
    for pattern in ("a", "b", "b.w*", "re:^b", "b.weight", "Linear", "Embedding"):
        assert treated(net, targets=[pattern]) == ["a.weight"]
    assert treated(net, targets=["*"], ignore=["b"]) == []


# --- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False])
def test_names_are_those_before_compilation(net, whole):
    expected = [(verdict.name, verdict.treated) for verdict in find_targets(net)]
    net["head"] = torch.compile(net["head"])
    compiled = torch.compile(net) if whole else net
    verdicts = find_targets(compiled)
    assert [(verdict.name, verdict.treated) for verdict in verdicts] == expected
    assert treated(compiled, targets=["head"]) == treated(compiled, targets=["head.weight"]) == ["head.weight"]
    assert [verdict.path for verdict in verdicts] == [name for name, _ in compiled.named_parameters()]
    assert all(compiled.get_parameter(verdict.path) is verdict.parameter for verdict in verdicts)


# --- patterns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("stages.1.conv.weight", ["stages.1.conv.weight"]),  # a parameter
        ("stages.1", ["stages.1.conv.weight"]),  # a module
        ("stages.?", CONVS),  # a glob over modules
        ("*.conv.w*", CONVS),  # a glob over parameters
        ("stages.[!0]*", ["stages.1.conv.weight"]),
        ("re:conv|head", [*CONVS, "head.weight"]),  # an expression is searched, a glob must match as a whole
        (r"re:^stages\.\d\.conv\.weight$", CONVS),
        ("Conv2d", CONVS),  # a class
        ("_ConvNd", CONVS),  # a class from which it derives
        ("ModuleList", CONVS),  # a class further out
        ("*", [*CONVS, "head.weight"]),  # vectors must be named in full
        ("re:.", [*CONVS, "head.weight"]),
        ("BatchNorm2d", []),
        ("stages.1.norm", []),
        ("stages.1.norm.weight", ["stages.1.norm.weight"]),
        ("head.bias", ["head.bias"]),
    ],
)
def test_patterns(net, pattern, expected):
    assert treated(net, targets=[pattern]) == expected
    ignored = {name for name, reason in reasons(net, targets=["*"], ignore=[pattern]).items() if "ignore" in reason}
    assert ignored == {name for name in expected if net.get_parameter(name).ndim > 1}


def test_patterns_add_up(net):
    assert treated(net, targets=["head", "stages.0"]) == ["stages.0.conv.weight", "head.weight"]
    assert treated(net, targets=["*"], ignore=["head", "stages.0"]) == ["stages.1.conv.weight"]
    assert treated(net, targets=[]) == []


def test_embeddings_are_treated_when_named():
    net = nn.ModuleDict({"words": nn.Embedding(5, 4), "positions": nn.ParameterList([torch.zeros(1, 5, 4)])})
    for patterns in (["words"], ["Embedding"], ["words.weight"]):
        assert treated(net, targets=patterns) == ["words.weight"]
    assert treated(net, targets=["positions.*"]) == ["positions.0"]


def test_named_weights_that_cannot_train_stay_dense(net):
    net["head"].requires_grad_(False)
    assert reasons(net, targets=["head.weight"])["head.weight"] == "frozen"


# --- overrides -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weak", "strong"),
    [
        ("Conv2d", "*"),  # a class yields to a glob, however short
        ("Conv2d", "re:."),
        ("ModuleList", "stages"),  # and to a module
        ("stages", "stages.1"),  # then the longer pattern wins
        ("stages.*", "stages.1.*"),
        ("stages.1.conv.weigh?", "stages.1.conv.weight"),  # a full name beats everything
        ("re:^stages.1.conv.weight$", "stages.1.conv.weight"),
    ],
)
def test_precedence_of_overrides(net, weak, strong):
    entries = {weak: {"sparsity": 0.25}, strong: {"sparsity": 0.5}}
    for overrides in (entries, dict(reversed(entries.items()))):
        sparsity = {verdict.name: verdict.sparsity for verdict in find_targets(net, overrides=overrides)}
        assert sparsity["stages.1.conv.weight"] == 0.5
    assert find_targets(net, overrides={weak: {"sparsity": 0.25}})[4].sparsity == 0.25


def test_none_leaves_dense_what_a_weaker_pattern_would_treat(net):
    verdicts = find_targets(net, overrides={"stages": {"sparsity": 0.5}, "stages.1": None})
    assert {v.name: v.sparsity for v in verdicts if v.treated} == {"stages.0.conv.weight": 0.5, "head.weight": None}
    assert verdicts[4].reason == "dense by `overrides['stages.1']`"


def test_overrides_leave_the_others_alone(net):
    verdicts = find_targets(net, overrides={"head": {"sparsity": 0.5}, "stages.0": None})
    assert {v.name: v.sparsity for v in verdicts if v.treated} == {"stages.1.conv.weight": None, "head.weight": 0.5}
    assert [v.reason for v in verdicts if v.treated] == ["Conv2d", "Linear, own sparsity 0.5"]


def test_override_of_a_weight_that_stays_dense_is_an_error(net):
    frozen = "Expected `overrides['head']` to match a weight made sparse, but got head.weight: frozen; head.bias: fewer"
    net["head"].requires_grad_(False)
    refuse(frozen, net, overrides={"head": {"sparsity": 0.5}})
    ignored = "`overrides['stages.0.conv']` to match a weight made sparse, but got stages.0.conv.weight: in `ignore`"
    refuse(ignored, net, overrides={"stages.0.conv": {"sparsity": 0.5}}, ignore=["stages"])
    assert treated(net, overrides={"head": None}) == CONVS


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["targets", "ignore", "overrides"])
@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("haed", "Did you mean 'head'?"),
        ("conv2d", "Did you mean 'Conv2d'"),
        ("stages.2", "Did you mean 'stages.1' or 'stages.0'"),
        ("re:stages.2.conv", "Did you mean 'stages.1.conv' or 'stages.0.conv'"),
        ("zzz", "Known names are, among others, ['BatchNorm2d', 'Conv2d', 'Linear'"),
    ],
)
def test_pattern_that_matches_nothing_names_near_matches(net, argument, pattern, hint):
    patterns = {pattern: None} if argument == "overrides" else [pattern]
    message = f"Expected each pattern in `{argument}` to match a parameter, but {pattern!r} matches none. {hint}"
    refuse(message, net, **{argument: patterns})


@pytest.mark.parametrize("argument", ["targets", "ignore"])
def test_single_string_is_not_a_list(net, argument):
    with pytest.raises(TypeError, match=rf"`{argument}` to be a list of patterns .* 'head'\. Write \['head'\]\."):
        find_targets(net, **{argument: "head"})
