"""Listen to the weight-loader calls that vLLM's layerwise reload counts, and keeps until a layer is complete."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from inspect import BoundArguments
from typing import Any

from vllm.model_executor.model_loader.reload import layerwise as vllm

WeightLoader = Callable[..., Any]
Listener = Callable[
    [WeightLoader, BoundArguments, int], None
]  # the int: number of elements that the call copied

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def told_to(listener: Listener) -> Iterator[None]:
    """Call `listener` for every weight-loader call, right after vLLM has counted it."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def install() -> None:
    """Replace vLLM's counting function by one that also calls the listener."""
    count = vllm.get_numel_loaded
    vllm.get_numel_loaded = functools.wraps(count)(functools.partial(_counted, count))


def _counted(
    count: Callable[..., tuple[int, Any]], loader: WeightLoader, call: BoundArguments
) -> tuple[int, Any]:
    copied, result = count(loader, call)
    listener = _listener.get()
    if listener is not None:
        listener(loader, call, copied)
    return copied, result
