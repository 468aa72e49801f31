"""Which numbers in a network depend on which others: its program is run on tensors in which unknown numbers are NaN.

Every operation of the program turns unknown numbers into unknown ones. In convolutions and linear layers a weight that
is zero reads nothing, and what is zero stays zero in a product; all numbers are taken to be finite. An operation that
is not in the list of those that hand NaN on makes all that it returns unknown. So a number that is known in the end is
known for certain.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_any, tree_leaves, tree_map_only

__all__ = ["Channels", "Unknowns", "channel_dim"]

# What hands on NaN where an output depends on it, and nowhere else.
# fmt: off
_HANDS_ON = {
    "_adaptive_avg_pool2d", "_native_batch_norm_legit_no_training", "_to_copy", "_unsafe_view", "abs",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "add", "alias", "avg_pool1d",
    "avg_pool2d", "avg_pool3d", "batch_norm", "cat", "celu", "chunk", "clamp", "clone", "contiguous", "detach",
    "div", "elu", "erf", "exp", "expand", "flatten", "gelu", "hardsigmoid", "hardswish", "hardtanh",
    "leaky_relu", "max_pool1d", "max_pool2d", "max_pool3d", "mean", "mish", "mul", "neg", "permute", "prelu", "relu",
    "relu6", "reshape", "select", "selu", "sigmoid", "silu", "slice", "softplus", "split", "split_with_sizes",
    "sqrt", "squeeze", "sub", "t", "tanh", "transpose", "unsqueeze", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_nearest3d", "view",
}
# fmt: on
_LAYERS = {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear"}
# Of operations that treat each channel alone: which argument tells the layer.
_CHANNELWISE = {"_native_batch_norm_legit_no_training": 3, "batch_norm": 3, "prelu": 1}


class Channels(NamedTuple):
    """What is known of the input of a layer, channel by channel.

    Attributes:
        constant: The number that a channel is, shape ``(channels,)``; NaN if it is not one known number.
        some: Whether some of its numbers are unknown, bool.
        all: Whether all of them are, bool.
        padded: Whether the layer puts zeros around its input, so that a constant is none at the borders.
    """

    constant: Tensor
    some: Tensor
    all: Tensor
    padded: bool


class Unknowns(fx.Interpreter):
    """Runs a program in which some numbers are unknown.

    Args:
        program: The network, functionalized; its inputs and the places of its weights are read from its signature.
        model: Whose weights to use.
        unknown: Outputs that are unknown, indices by name of the layer. If None, all inputs of the program are unknown
            and nothing else.

    Attributes:
        inputs: What was known of the input of each convolution, linear layer, batch norm and PReLU, once for each use.
        leaks: Whether an output of the program is unknown.
    """

    def __init__(self, program: ExportedProgram, model: nn.Module, unknown: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(program.graph_module)
        self.program, self.model, self.unknown = program, model, unknown
        self.inputs: dict[str, list[Channels]] = {}
        self.leaks = False
        self._lost: set[fx.Node] = set()  # whose values hold unknown numbers that NaN cannot stand for, or may
        self._names = {
            spec.arg.name: spec.target for spec in program.graph_signature.input_specs if spec.target is not None
        }

    @torch.no_grad()
    def trace(self, *args: Any, **kwargs: Any) -> "Unknowns":
        """Run it as the model is run."""
        model = self.model
        state: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        state |= dict(model.named_buffers(remove_duplicate=False))
        given, values = iter(tree_leaves((args, kwargs))), []
        for spec in self.program.graph_signature.input_specs:
            if spec.kind == InputKind.USER_INPUT:
                values.append(next(given))
            else:
                values.append(state.get(spec.target, self.program.constants.get(spec.target)))
        self.run(*values)
        return self

    def run_node(self, n: fx.Node) -> Any:
        """Run one operation."""
        if n.op == "placeholder":
            return self._placeholder(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.op == "output":
            self.leaks = self._is_unknown(n, (args, kwargs))
            return args[0]
        if n.op != "call_function":
            return super().run_node(n)
        op = getattr(getattr(n.target, "overloadpacket", n.target), "__name__", "")
        if op in _LAYERS:
            return self._layer(n, op, args, kwargs)
        if op in _CHANNELWISE:
            self._look(self._owner(n, _CHANNELWISE[op]), args[0].transpose(0, 1), padded=False)
        if (
            self.unknown is None
            and n.target is torch.ops.aten.mul.Tensor
            and not self._lost.intersection(n.all_input_nodes)
        ):
            zero = torch.as_tensor(args[0] == 0) | torch.as_tensor(args[1] == 0)
            return n.target(*args).masked_fill(zero, 0.0)
        if self._is_random(n, op, args, kwargs) or (
            self._is_unknown(n, (args, kwargs)) and not self._hands_on(n, op, args)
        ):
            return self._nothing(n)
        if op in ("view", "_unsafe_view"):  # numbers may lie in another order here
            return args[0].reshape(args[1])
        return n.target(*args, **kwargs)  # type: ignore[operator]

    def _placeholder(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        signature = self.program.graph_signature
        is_input = self.unknown is None and n.name in signature.user_inputs and isinstance(value, Tensor)
        return (
            self._nothing(n) if is_input or self._names.get(n.name) in signature.buffers_to_mutate.values() else value
        )

    def _layer(self, n: fx.Node, op: str, args: Any, kwargs: Any) -> Tensor:
        """A convolution or a linear layer: what is unknown goes where a weight is not zero."""
        x, weight, bias = args[0], args[1], args[2] if len(args) > 2 else kwargs.get("bias")
        dim, name = channel_dim(weight), self._owner(n, 1)
        padding = kwargs.get("padding", args[4] if len(args) > 4 else 0)
        padded = "transpose" in op or bool(padding != "valid" if isinstance(padding, str) else tree_any(bool, padding))
        self._look(name, x.movedim(dim, 0), padded=padded)
        unknown = x.isnan()
        if self.unknown is None and padded:
            unknown |= x != 0  # it is known, but another number at the borders, wherever these are
        rest = (args[3:], {key: value for key, value in kwargs.items() if key != "bias"})
        out = n.target(x.masked_fill(unknown, 0.0), weight, bias, *rest[0], **rest[1])  # type: ignore[operator]
        reads = n.target(unknown.float(), weight.ne(0).float(), None, *rest[0], **rest[1])  # type: ignore[operator]
        out = out.masked_fill(reads > 0, torch.nan)
        if self.unknown is not None and name is not None and name in self.unknown:
            out.index_fill_(dim, self.unknown[name].to(out.device), torch.nan)
        if self._lost.intersection(n.all_input_nodes):
            return self._nothing(n)  # type: ignore[no-any-return]
        return out  # type: ignore[no-any-return]

    def _owner(self, n: fx.Node, argument: int) -> str | None:
        """Name of the layer whose tensor is this argument."""
        node = n.args[argument]
        tensor = self._names.get(node.name) if isinstance(node, fx.Node) else None
        return None if tensor is None else tensor.rpartition(".")[0]

    def _look(self, name: str | None, x: Tensor, *, padded: bool) -> None:
        if name is None:
            return
        x = x.flatten(1) if x.ndim > 1 else x[:, None]
        unknown, first = x.isnan(), x[:, 0]
        constant = first.masked_fill((x != first[:, None]).any(1), torch.nan)
        self.inputs.setdefault(name, []).append(Channels(constant, unknown.any(1), unknown.all(1), padded))

    def _is_unknown(self, n: fx.Node, values: Any) -> bool:
        return bool(self._lost.intersection(n.all_input_nodes)) or tree_any(
            lambda value: isinstance(value, Tensor) and value.is_floating_point() and bool(value.isnan().any()), values
        )

    def _is_random(self, n: fx.Node, op: str, args: Any, kwargs: Any) -> bool:
        if op == "scaled_dot_product_attention":
            return bool(args[4] if len(args) > 4 else kwargs.get("dropout_p"))
        return torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())

    def _hands_on(self, n: fx.Node, op: str, args: Any) -> bool:
        if self._lost.intersection(n.all_input_nodes):
            return False
        if op == "getitem":
            return True
        floating = all(
            value.is_floating_point() for value in tree_leaves(n.meta.get("val")) if isinstance(value, Tensor)
        )
        pads = op.startswith("avg_pool") and tree_any(bool, args[3:4])
        return op in _HANDS_ON and floating and not pads

    def _nothing(self, n: fx.Node) -> Any:
        """An output of which nothing is known."""
        meta = n.meta.get("val")  # None if nothing is returned
        if not all(isinstance(value, Tensor) and value.is_floating_point() for value in tree_leaves(meta)):
            self._lost.add(n)
        return tree_map_only(
            Tensor,
            lambda like: torch.full(
                like.shape, torch.nan if like.is_floating_point() else 0, dtype=like.dtype, device=like.device
            ),
            meta,
        )


def channel_dim(weight: Tensor) -> int:
    """Where the channels of input and output are, counted from the end.

    Args:
        weight: Of a linear layer or a convolution.

    Example:
        >>> channel_dim(nn.Conv2d(1, 1, 1).weight), channel_dim(nn.Linear(1, 1).weight)
        (-3, -1)
    """
    return -1 if weight.ndim == 2 else 1 - weight.ndim
