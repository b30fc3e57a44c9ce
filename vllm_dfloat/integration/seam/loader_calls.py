"""Listen to the weight-loader calls that vLLM's layerwise reload counts, and keeps until a layer is complete."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from inspect import BoundArguments
from typing import Any

import torch
from vllm.model_executor.model_loader.reload import layerwise as vllm

from vllm_dfloat.errors import UnsupportedError

WeightLoader = Callable[..., Any]
Listener = Callable[
    [WeightLoader, BoundArguments, int], None
]  # the int: number of elements that the call copied

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)
_counts: ContextVar[bool] = ContextVar("counts", default=False)


def is_counting() -> bool:
    """Return whether vLLM is calling a weight loader to count what it copies."""
    return _counts.get()


@contextmanager
def told_to(listener: Listener) -> Iterator[None]:
    """Call `listener` for every weight-loader call, right after vLLM has counted it."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@functools.cache
def install() -> None:
    """Once per process, replace vLLM's counting function by one that also calls the listener.

    It says which tensor does not fit, too, where vLLM raises an empty AssertionError.
    """
    count = vllm.get_numel_loaded
    vllm.get_numel_loaded = functools.wraps(count)(functools.partial(_counted, count))


def _counted(
    count: Callable[..., tuple[int, Any]], loader: WeightLoader, call: BoundArguments
) -> tuple[int, Any]:
    listener = _listener.get()
    token = _counts.set(True)
    try:
        copied, result = count(loader, call)
    except AssertionError as error:
        if str(error):
            raise
        # vLLM's counter compares sizes without a word.
        words = _misfit(loader, call)
        if listener is not None:
            raise ValueError(words) from error
        raise UnsupportedError(f"{words}. Get both from the same model.") from error
    finally:
        _counts.reset(token)
    if listener is not None:
        listener(loader, call, copied)
    return copied, result


def _misfit(loader: WeightLoader, call: BoundArguments) -> str:
    """Say which tensor does not fit which parameter; the loaders of experts are told its name, others are not."""
    given = {name: value for name, value in call.arguments.items() if name != "param"}
    shapes = [list(value.shape) for value in given.values() if isinstance(value, torch.Tensor)]
    layer, parameter = getattr(loader, "__self__", None), list(call.arguments["param"].shape)
    where = given.get("weight_name") or getattr(layer, "prefix", "") or type(layer).__name__
    part = f", {given['shard_id']} of expert {given['expert_id']}" if "expert_id" in given else ""
    return (
        f"{where}{part}: a tensor {', '.join(map(str, shapes))} does not fit into {parameter}; expected the shapes "
        "that config.json describes"
    )
