"""Running a module without leaving a trace in it."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["untouched"]


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Run eagerly in evaluation mode, without gradients or warnings, and then put everything back."""
    modules = [m for m in module.modules() if not isinstance(m, torch.jit.ScriptModule)]
    states = [(m, dict(vars(m)), dict(m._buffers)) for m in modules]
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    devices = {t.device.index for t in (*module.parameters(), *module.buffers()) if t.is_cuda}
    fastpath, cache = torch.backends.mha.get_fastpath_enabled(), torch.is_autocast_cache_enabled()
    with torch.random.fork_rng(sorted(devices)), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.backends.mha.set_fastpath_enabled(False)  # it fuses a whole encoder layer into one operator
            torch.set_autocast_cache_enabled(False)  # a weight cast before the trace would look like a constant
            for m, state, _ in states:
                m.training = False  # not `m.eval()`, which modules override to do more
                _run_eagerly(m, state)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)
            torch.set_autocast_cache_enabled(cache)
            for m, state, own_buffers in states:
                _restore_dict(vars(m), state)
                _restore_dict(m._buffers, own_buffers)
            for buffer, saved in buffers:
                if not torch.equal(buffer, saved):
                    buffer.copy_(saved)


def _run_eagerly(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Bypass `torch.compile` until the attributes of the module are restored: compiled code cannot be traced."""
    original = getattr(state.get("forward"), "_torchdynamo_orig_callable", None)
    if original is not None:
        vars(module)["forward"] = original
    if state.get("_compiled_call_impl") is not None:
        vars(module)["_compiled_call_impl"] = None


def _restore_dict(current: dict[str, Any], saved: dict[str, Any]) -> None:
    for name in current.keys() - saved.keys():
        del current[name]
    current.update(saved)
