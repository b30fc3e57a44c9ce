"""Guards of a compressed layer's placeholder: refuse load_state_dict and registering another parameter."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from vllm_dfloat.integration.layers.method import weights_of
from vllm_dfloat.integration.layers.placeholder import WeightPlaceholder
from vllm_dfloat.integration.seam import layerwise


def guard(model: torch.nn.Module) -> None:
    """Make load_state_dict and register_parameter refuse another weight for a compressed layer of this model.

    They refuse before anything is changed.
    """
    for module in model.modules():
        if any(True for _ in _compressed(module)):
            module.__dict__["load_state_dict"] = partial(_load_state_dict, module)
        if own := placeholders_of(module):
            module.__dict__["register_parameter"] = partial(_register_parameter, module, own)


def placeholders_of(layer: torch.nn.Module) -> dict[str, WeightPlaceholder]:
    """Return the placeholders of a layer's compressed weights by parameter; empty for other layers."""
    held = {name: layer._parameters.get(name) for name in weights_of(layer)}
    return {name: given for name, given in held.items() if isinstance(given, WeightPlaceholder)}


def refuse(model: torch.nn.Module, what: str) -> None:
    """Raise UnsupportedError for the first compressed layer, if there is one; `what` is the refused operation."""
    for _, placeholder in _compressed(model):
        placeholder.refuse(what)


def _compressed(module: torch.nn.Module) -> Iterator[tuple[str, WeightPlaceholder]]:
    """Yield (path, placeholder) of the compressed parameters in a module."""
    for path, layer in module.named_modules():
        for name, placeholder in placeholders_of(layer).items():
            yield f"{path}.{name}".lstrip("."), placeholder


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
        if strict or path in state_dict:
            placeholder.refuse("load_state_dict")
    return type(module).load_state_dict(module, state_dict, strict, assign)


def _register_parameter(
    layer: torch.nn.Module,
    placeholders: Mapping[str, WeightPlaceholder],
    name: str,
    param: torch.nn.Parameter | None,
) -> None:
    """Replace a compressed layer's register_parameter; setattr and vLLM's replace_parameter call it too."""
    is_reload = layerwise.is_open(layer) or (param is not None and param.is_meta)
    placeholder = placeholders.get(name)
    if placeholder is not None and param is not placeholder and not is_reload:
        placeholder.refuse("another parameter in place")
    type(layer).register_parameter(layer, name, param)
