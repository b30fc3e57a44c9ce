"""The hooks of the plugin in vLLM's layerwise reload (layerwise.py): who watches a model is told of each step."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from vllm.model_executor.model_loader.reload import layerwise as vllm

from vllm_dfloat.integration.seam import loader_calls

WATCHER = "dfloat11_watcher"  # the attribute of every module of a watched model


class Watcher(Protocol):
    """The interface of an object that is notified of a model's reloads.

    Attributes:
        model: the root of the watched modules.
        counts: while true, arrivals are only counted, and complete layers are not processed.
        fills_in: whether a materialized layer keeps its old values for parts that have not arrived.
    """

    model: torch.nn.Module
    counts: bool
    fills_in: bool

    def begins(self) -> None:
        """Called before the tensors of all layers are set aside."""

    def changes(self, layer: torch.nn.Module) -> None:
        """Called at least once before the layer's weights are changed."""

    def is_about_to_load(self, layer: torch.nn.Module) -> None:
        """Called before the layer leaves the meta device; no more of it will arrive."""

    def materialized(self, layer: torch.nn.Module) -> None:
        """Called when the layer has memory, but no values yet."""

    def finishing(self) -> AbstractContextManager[None]:
        """Return a context that encloses the end of a reload."""


def watch(model: torch.nn.Module, watcher: Watcher) -> None:
    """Notify a watcher of reloads of `model`. It is kept in an attribute: a registry would keep the model alive."""
    _install()
    for layer in model.modules():
        layer.__dict__[WATCHER] = watcher


def watcher_of(layer: torch.nn.Module) -> Watcher | None:
    """Return the watcher of the reloads of a layer's model, or None."""
    return layer.__dict__.get(WATCHER)


@functools.cache
def _install() -> None:
    """Once per process, replace the functions in vLLM's module by wrappers; vLLM's other functions there call these."""
    hooks = {
        "restore_layer_on_meta": _restore,
        "materialize_layer": _materialize,
        "_layerwise_process": _process,
        "_copy_and_restore_kernel_tensors": _copy,
        "finalize_layerwise_processing": _finalize,
    }
    for name, hook in hooks.items():
        original = getattr(vllm, name)
        setattr(vllm, name, functools.wraps(original)(functools.partial(_watched, hook, original)))
    loader_calls.install()


def _watched(
    hook: Callable[..., None],
    original: Callable[..., None],
    layer: torch.nn.Module,
    *args: Any,
    **kwargs: Any,
) -> None:
    watcher, call = watcher_of(layer), functools.partial(original, layer, *args, **kwargs)
    if watcher is None:
        call()
    else:
        hook(watcher, layer, call)


def _restore(watcher: Watcher, layer: torch.nn.Module, call: Callable[[], None]) -> None:
    if layer is watcher.model:  # the root is the first
        watcher.begins()
    call()


def _materialize(watcher: Watcher, layer: torch.nn.Module, call: Callable[[], None]) -> None:
    call()
    watcher.materialized(layer)


def _process(watcher: Watcher, layer: torch.nn.Module, call: Callable[[], None]) -> None:
    if not watcher.counts:
        watcher.is_about_to_load(layer)
        watcher.changes(layer)
        call()


def _copy(watcher: Watcher, layer: torch.nn.Module, call: Callable[[], None]) -> None:
    watcher.changes(layer)
    call()


def _finalize(watcher: Watcher, _: torch.nn.Module, call: Callable[[], None]) -> None:
    with watcher.finishing():
        call()
