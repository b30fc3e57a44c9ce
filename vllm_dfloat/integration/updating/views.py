"""Buffers that are views of another module's parameter, such as the convolution's weights in a Mamba 2 mixer.

They are made with the model. Where a parameter later moves to other memory (on a CPU, vLLM packs it for a kernel and
frees it), a view goes on serving the memory that it was made of, so an update has to write there.
"""

from typing import Any

import torch

VIEWS = "dfloat11_views"  # the attribute of a layer: name of a parameter -> the buffers that are views of all of it


def note(model: torch.nn.Module) -> None:
    """Note the views of all parameters of a model that was just built."""
    buffers = {
        tensor.data_ptr(): tensor
        for layer in model.modules()
        for tensor in layer._buffers.values()
        if tensor is not None and not tensor.is_meta and tensor.numel()
    }
    for layer in model.modules():
        for name, parameter in layer._parameters.items():
            if parameter is None or parameter.is_meta:
                continue
            view = buffers.get(parameter.data_ptr())
            if view is not None and _is_whole_view(view, parameter):
                layer.__dict__.setdefault(VIEWS, {})[name] = view


def _is_whole_view(view: torch.Tensor, parameter: torch.Tensor) -> bool:
    same_kind = view.dtype == parameter.dtype and view.numel() == parameter.numel()
    return same_kind and view.is_contiguous() and parameter.is_contiguous()


def of(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the views of a layer's parameters, by the parameters' names."""
    found: dict[str, Any] = layer.__dict__.get(VIEWS, {})
    return found


def load_into(layer: torch.nn.Module) -> None:
    """Let the parameters of a layer that has just got memory for an update have that of their views."""
    for name, view in of(layer).items():
        parameter = layer._parameters.get(name)
        if parameter is not None and parameter.numel() == view.numel():
            parameter.data = view.view(parameter.shape)
