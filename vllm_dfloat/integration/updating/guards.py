"""Guards of a compressed layer's placeholder: refuse load_state_dict and registering another parameter."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from vllm_dfloat.integration.layers.method import packed_of
from vllm_dfloat.integration.layers.placeholder import WeightPlaceholder
from vllm_dfloat.integration.seam import layerwise


def guard(model: torch.nn.Module) -> None:
    """Make load_state_dict and register_parameter refuse another weight for a compressed layer of this model.

    They refuse before anything is changed.
    """
    for module in model.modules():
        layers = dict(_compressed(module))
        if layers:
            module.__dict__["load_state_dict"] = partial(_load_state_dict, module)
        if "" in layers:
            module.__dict__["register_parameter"] = partial(_register_parameter, module, layers[""])


def placeholder_of(layer: torch.nn.Module) -> WeightPlaceholder | None:
    """Return the placeholder of a compressed layer's weight; None for other layers."""
    weight = layer._parameters.get("weight")
    is_compressed = packed_of(layer) is not None and isinstance(weight, WeightPlaceholder)
    return weight if is_compressed else None  # type: ignore[return-value]


def refuse(model: torch.nn.Module, what: str) -> None:
    """Raise UnsupportedError for the first compressed layer, if there is one; `what` is the refused operation."""
    for _, placeholder in _compressed(model):
        placeholder.refuse(what)


def _compressed(module: torch.nn.Module) -> Iterator[tuple[str, WeightPlaceholder]]:
    """Yield (path, placeholder) of the compressed layers in a module."""
    for path, layer in module.named_modules():
        placeholder = placeholder_of(layer)
        if placeholder is not None:
            yield path, placeholder


def _load_state_dict(
    module: torch.nn.Module,
    state_dict: Mapping[str, Any],
    strict: bool = True,
    assign: bool = False,
) -> Any:
    """Replace a module's load_state_dict: refuse compressed layers' weights before torch copies any other weight.

    With `strict`, a state dict without these weights is refused too: torch would copy the others before it raises.
    """
    for path, placeholder in _compressed(module):
        if strict or f"{path}.weight".lstrip(".") in state_dict:
            placeholder.refuse("load_state_dict")
    return type(module).load_state_dict(module, state_dict, strict, assign)


def _register_parameter(
    layer: torch.nn.Module,
    placeholder: WeightPlaceholder,
    name: str,
    param: torch.nn.Parameter | None,
) -> None:
    """Replace a compressed layer's register_parameter; setattr and vLLM's replace_parameter call it too."""
    is_reload = layerwise.is_open(layer) or (param is not None and param.is_meta)
    if name == "weight" and param is not placeholder and not is_reload:
        placeholder.refuse("another parameter in place")
    type(layer).register_parameter(layer, name, param)
