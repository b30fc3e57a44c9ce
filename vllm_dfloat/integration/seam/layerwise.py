"""vLLM's layerwise reload: its private names.

A reload sets aside the tensors of each layer (its "kernel tensors"), puts the layer on the meta device and counts the
elements that arrive. A complete layer is materialized, loaded and processed; then its values are copied into the
tensors set aside, and the layer gets these tensors back. A layer that received nothing gets them back unchanged.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.model_executor.model_loader.reload import layerwise as vllm
from vllm.model_executor.model_loader.reload import meta

from vllm_dfloat.integration.seam import compat
from vllm_dfloat.integration.seam.reload_hooks import watcher_of


def is_open(layer: torch.nn.Module) -> bool:
    """Return whether a reload has begun and this layer still waits for weights, or for the end of the reload."""
    return bool(vllm.get_layerwise_info(layer).can_load())


def begin(model: torch.nn.Module) -> None:
    """Start a reload: set aside the tensors of all layers."""
    vllm.initialize_layerwise_reload(model)


def finish(model: torch.nn.Module, model_config: Any) -> None:
    """End a reload: process layers that have received a part, such as all but padding; restore untouched layers."""
    vllm.finalize_layerwise_reload(model, model_config)


def process(layer: torch.nn.Module) -> None:
    """Process a layer now, with what has arrived for it; nothing more may arrive."""
    vllm._layerwise_process(layer, vllm.get_layerwise_info(layer))


def abandon(model: torch.nn.Module) -> None:
    """Cancel a reload: layers that are not complete get back the tensors set aside."""
    for layer in model.modules():
        info = vllm.get_layerwise_info(layer)
        if info.can_load() and info.kernel_tensors is not None:
            vllm._place_kernel_tensors(layer, info)
        info.reset()
    if hasattr(model, "_original_do_torchao_reload"):
        model._do_torchao_reload = model._original_do_torchao_reload
    vllm.LOADING_LAYERS.clear()


def forget_arrivals(model: torch.nn.Module) -> None:
    """Reset every layer's record of arrivals, as at the start of the reload."""
    for layer in model.modules():
        info = vllm.get_layerwise_info(layer)
        info.load_numel = 0
        info.loaded_weights.clear()


def arrived(layer: torch.nn.Module) -> tuple[int, int]:
    """Return how many elements of a layer have arrived in an update, and how many are needed to leave none unset."""
    info = vllm.get_layerwise_info(layer)
    begun = {name for name, _ in info.loaded_weights}
    tensors = {**dict(layer._parameters), **dict(layer._buffers)}
    # A tensor that is written in place keeps its value if nothing arrives for it.
    counted = [t for name, t in tensors.items() if t is not None and (t.is_meta or name in begun)]
    weight = layer._parameters.get("weight")
    padding = 0 if weight is None else compat.num_padding(layer, weight)
    return int(info.load_numel), sum(tensor.numel() for tensor in counted) - padding


def without_arrivals(layer: torch.nn.Module) -> list[str]:
    """Return the names of a layer's meta parameters for which nothing has arrived; none for attention layers."""
    if vllm.is_deferred_attention_layer(layer):
        return []
    return [name for name, _ in layer.named_parameters(recurse=False) if is_deaf(layer, name)]


def has_nothing(layer: torch.nn.Module) -> bool:
    """Return whether no weight loader was called for a layer that is being processed."""
    return not vllm.get_layerwise_info(layer).loaded_weights


def is_deaf(layer: torch.nn.Module, name: str) -> bool:
    """Return whether a parameter is still on the meta device and its weight loader was never called."""
    parameter = layer._parameters.get(name)
    if parameter is None or not is_open(layer) or not parameter.is_meta:
        return False
    return all(loaded != name for loaded, _ in vllm.get_layerwise_info(layer).loaded_weights)


def on_meta(parameter: torch.Tensor) -> torch.Tensor:
    """Return a meta copy of a parameter, with the class and the attributes that vLLM's weight loaders use."""
    return meta.to_meta_tensor(parameter)  # type: ignore[no-any-return]


def repeat_loading(layer: torch.nn.Module, name: str, parameter: torch.Tensor) -> None:
    """Repeat the recorded weight-loader calls for the parameter `name`, into `parameter`, without counting them."""
    loader = vllm._get_original_loader(getattr(layer, name))
    for loaded, call in vllm.get_layerwise_info(layer).loaded_weights:
        if loaded == name:
            before = call.arguments["param"]
            call.arguments["param"] = parameter
            loader(*call.args, **call.kwargs)
            call.arguments["param"] = before


def let_go_of_loaded(layer: torch.nn.Module) -> None:
    """Drop the tensors that the recorded weight-loader calls refer to; after the layer is loaded, vLLM needs none."""
    for _, call in vllm.get_layerwise_info(layer).loaded_weights:
        for name, value in call.arguments.items():
            if isinstance(value, torch.Tensor):
                call.arguments[name] = None


def keep_in_place(layer: torch.nn.Module, names: Iterable[str]) -> None:
    """At a reload, move new parameters into the memory of the old ones, which the layer will get back.

    A kernel that was given the new ones would not see later writes to the old.
    """
    before = set_aside(layer)
    for name in names:
        new, old = layer._parameters.get(name), before.get(name)
        if (
            new is not None
            and old is not None
            and old.shape == new.shape
            and old.dtype == new.dtype
        ):
            old.data.copy_(new.data)
            new.data = old.data


def keeps_rest(layer: torch.nn.Module) -> bool:
    """Return whether a layer in an update keeps its old values for parts that have not arrived."""
    watcher = watcher_of(layer)
    return watcher is not None and watcher.fills_in and is_open(layer)


def set_aside(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers that a layer had before the reload."""
    parameters, buffers = vllm.get_layerwise_info(layer).kernel_tensors or ({}, {})
    return {**parameters, **buffers}


def written_in_place(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of a layer that a reload does not set aside; values for them are written on arrival."""
    tensors = {**dict(layer._parameters), **dict(layer._buffers)}
    skips_all = type(layer).__name__ in meta.SKIP_MODULES
    return {
        name: tensor
        for name, tensor in tensors.items()
        if tensor is not None and (skips_all or name in meta.SKIP_TENSORS)
    }


def process_attention(model: torch.nn.Module, model_config: Any) -> None:
    """Let attention layers recompute the tensors that they derive from other layers, as at the end of a reload.

    One whose `kv_b_proj` vLLM has freed (latent attention on a CPU) keeps what it has: no reload can change that.
    """
    for layer in model.modules():
        source = getattr(getattr(layer, "kv_b_proj", None), "weight", None)
        is_freed = source is not None and not source.numel()
        if vllm.is_deferred_attention_layer(layer) and not is_freed:
            layer.process_weights_after_loading(model_config.dtype)  # type: ignore[operator]


@contextmanager
def without_warnings() -> Iterator[None]:
    """Suppress vLLM's warning for each layer that keeps its weights."""

    def is_wanted(record: logging.LogRecord) -> bool:
        return "Failed to load weights" not in record.msg

    vllm.logger.addFilter(is_wanted)
    try:
        yield
    finally:
        vllm.logger.removeFilter(is_wanted)
