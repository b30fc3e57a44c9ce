"""vLLM's layerwise reload: its private names, and the points of it at which we take part.

A reload sets aside what each layer holds (its "kernel tensors"), puts the layer on the meta device and counts what
arrives. A complete layer is materialized, loaded and processed, and copied into the tensors set aside, which take its
place again. Layers that got nothing get back what was set aside.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from vllm.model_executor.model_loader.reload import layerwise as vllm
from vllm.model_executor.model_loader.reload import meta

from vllm_dfloat.integration.seam import compat, loader_calls

WATCHER = "dfloat11_watcher"  # the attribute of every module of a watched model


class Watcher(Protocol):
    """What is told of a model's reloads.

    Attributes:
        model: the root of the watched modules.
        counts: while it is true, layers that are complete are not processed.
        fills_in: whether layers that are materialized get the values they had.
    """

    model: torch.nn.Module
    counts: bool
    fills_in: bool

    def begins(self) -> None:
        """All layers are about to be set aside."""

    def changes(self, layer: torch.nn.Module) -> None:
        """What the layer holds is about to be changed; said at least once."""

    def is_about_to_load(self, layer: torch.nn.Module) -> None:
        """The layer still waits on the meta device, and gets no more than what has arrived."""

    def materialized(self, layer: torch.nn.Module) -> None:
        """The layer has got memory, not filled yet."""

    def finishing(self) -> AbstractContextManager[None]:
        """Enclose the end of a reload."""


def watch(model: torch.nn.Module, watcher: Watcher) -> None:
    """Have a watcher told of reloads of `model`. An attribute: a registry would keep the model alive."""
    _install()
    for layer in model.modules():
        layer.__dict__[WATCHER] = watcher


def watcher_of(layer: torch.nn.Module) -> Watcher | None:
    """Return who watches the reloads of a layer's model, if anybody does."""
    return layer.__dict__.get(WATCHER)


def is_open(layer: torch.nn.Module) -> bool:
    """Return whether a reload has begun, and this layer waits for weights or for the end."""
    return bool(vllm.get_layerwise_info(layer).can_load())


def begin(model: torch.nn.Module) -> None:
    """Set all layers aside and wait for weights."""
    vllm.initialize_layerwise_reload(model)


def finish(model: torch.nn.Module, model_config: Any) -> None:
    """Process layers that wait for padding, and give the others back what they had."""
    vllm.finalize_layerwise_reload(model, model_config)


def abandon(model: torch.nn.Module) -> None:
    """End a reload: layers that are not complete get back what was set aside."""
    for layer in model.modules():
        info = vllm.get_layerwise_info(layer)
        if info.can_load() and info.kernel_tensors is not None:
            vllm._place_kernel_tensors(layer, info)
        info.reset()
    if hasattr(model, "_original_do_torchao_reload"):
        model._do_torchao_reload = model._original_do_torchao_reload
    vllm.LOADING_LAYERS.clear()


def forget_arrivals(model: torch.nn.Module) -> None:
    """Go back to where nothing has arrived yet."""
    for layer in model.modules():
        info = vllm.get_layerwise_info(layer)
        info.load_numel = 0
        info.loaded_weights.clear()


def arrived(layer: torch.nn.Module) -> tuple[int, int]:
    """Return how many elements have arrived in an update, and how many must, so that none is left without a value."""
    info = vllm.get_layerwise_info(layer)
    begun = {name for name, _ in info.loaded_weights}
    tensors = {**dict(layer._parameters), **dict(layer._buffers)}
    # What is written in place keeps its value if nothing arrives for it.
    counted = [t for name, t in tensors.items() if t is not None and (t.is_meta or name in begun)]
    weight = layer._parameters.get("weight")
    padding = 0 if weight is None else compat.num_padding(layer, weight)
    return int(info.load_numel), sum(tensor.numel() for tensor in counted) - padding


def without_arrivals(layer: torch.nn.Module) -> list[str]:
    """Return the parameters without memory of a layer for which nothing has arrived; attention's scales may stay."""
    if vllm.is_deferred_attention_layer(layer):
        return []
    return [name for name, _ in layer.named_parameters(recurse=False) if is_deaf(layer, name)]


def has_nothing(layer: torch.nn.Module) -> bool:
    """Return whether vLLM's loaders were never called for a layer that is being processed."""
    return not vllm.get_layerwise_info(layer).loaded_weights


def is_deaf(layer: torch.nn.Module, name: str) -> bool:
    """Return whether a parameter still waits on the meta device, and its weight loader was never called."""
    parameter = layer._parameters.get(name)
    if parameter is None or not is_open(layer) or not parameter.is_meta:
        return False
    return all(loaded != name for loaded, _ in vllm.get_layerwise_info(layer).loaded_weights)


def on_meta(parameter: torch.Tensor) -> torch.Tensor:
    """Return a parameter without memory, with the class and the attributes that vLLM's weight loaders look at."""
    return meta.to_meta_tensor(parameter)  # type: ignore[no-any-return]


def repeat_loading(layer: torch.nn.Module, name: str, parameter: torch.Tensor) -> None:
    """Repeat, into `parameter`, the calls that have loaded the parameter `name` of a layer, without counting them."""
    loader = vllm._get_original_loader(getattr(layer, name))
    for loaded, call in vllm.get_layerwise_info(layer).loaded_weights:
        if loaded == name:
            before = call.arguments["param"]
            call.arguments["param"] = parameter
            loader(*call.args, **call.kwargs)
            call.arguments["param"] = before


def keeps_rest(layer: torch.nn.Module) -> bool:
    """Return whether what has not arrived of a layer in an update is there already, from before."""
    watcher = watcher_of(layer)
    return watcher is not None and watcher.fills_in and is_open(layer)


def set_aside(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers that a layer had before the reload."""
    parameters, buffers = vllm.get_layerwise_info(layer).kernel_tensors or ({}, {})
    return {**parameters, **buffers}


def written_in_place(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of a layer that a reload leaves where they are, and writes as soon as they arrive."""
    tensors = {**dict(layer._parameters), **dict(layer._buffers)}
    skips_all = type(layer).__name__ in meta.SKIP_MODULES
    return {
        name: tensor
        for name, tensor in tensors.items()
        if tensor is not None and (skips_all or name in meta.SKIP_TENSORS)
    }


def process_attention(model: torch.nn.Module, model_config: Any) -> None:
    """Let attention layers derive again what they derive from other layers' weights, as at the end of a reload."""
    for layer in model.modules():
        if vllm.is_deferred_attention_layer(layer):
            layer.process_weights_after_loading(model_config.dtype)  # type: ignore[operator]


@contextmanager
def without_warnings() -> Iterator[None]:
    """Spare the log a line for each layer that keeps its weights."""

    def is_wanted(record: logging.LogRecord) -> bool:
        return "Failed to load weights" not in record.msg

    vllm.logger.addFilter(is_wanted)
    try:
        yield
    finally:
        vllm.logger.removeFilter(is_wanted)


@functools.cache
def _install() -> None:
    """Put our functions, once, where vLLM's look each other up by name, whoever has imported them."""
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
    if layer is watcher.model:  # the first of all
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
