"""An update that gives a part of a layer keeps the layer's other values."""

from typing import Any

import torch

from vllm_dfloat.errors import FormatError, UnsupportedError
from vllm_dfloat.integration.layers import method
from vllm_dfloat.integration.seam import expert_kernels, layer_kinds, layerwise
from vllm_dfloat.integration.seam.incoming import AS_BEFORE
from vllm_dfloat.integration.updating import views


def fill_in(layer: torch.nn.Module, path: str, needs_all: bool) -> None:
    """Fill a materialized layer with its old values, before the part of its weights that has arrived is loaded.

    Args:
        path: its name in the model, for messages.
        needs_all: whether a tensor without old values is an error.

    Raises:
        UnsupportedError: `needs_all`, and old values are in another form than a checkpoint's; or they are gone.
    """
    before, stays = layerwise.set_aside(layer), layerwise.written_in_place(layer)
    has_its_form = not layer_kinds.is_experts(layer) or expert_kernels.keeps_form_of_experts(layer)
    values = _values(layer, path) if has_its_form else {}
    for name, tensor in [*layer._parameters.items(), *layer._buffers.items()]:
        if tensor is None or name in stays:
            continue
        if name in values:
            tensor.data.copy_(values.pop(name))
        elif name in views.of(layer):
            continue  # it has the memory of its view, with the old values
        elif name in before and before[name].shape == tensor.shape and has_its_form:
            tensor.data.copy_(before[name])
        elif needs_all:
            raise UnsupportedError(
                f"{path}.{name}: only a part of it was given, and what the layer has is in the form of "
                f"a kernel; expected the whole layer. {AS_BEFORE} Give all tensors of the layer in one call."
            )


def _values(layer: Any, path: str) -> dict[str, torch.Tensor]:
    """Return the decoded values of a compressed layer's parameters; empty for other layers."""
    names = list(method.weights_of(layer))
    if not names:
        return {}
    try:
        decoded = expert_kernels.method_of(layer).dequantize_weight(layer)
        return dict(zip(names, decoded if len(names) > 1 else [decoded], strict=True))
    except FormatError as error:
        raise UnsupportedError(
            f"{path}: only a part of it was given, and the rest is gone, as after sleep level 2 ({error}); expected "
            "the whole layer. Give all its tensors in one call, or all weights to reload_weights."
        ) from error
