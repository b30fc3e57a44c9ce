"""Saved values of those weights of a model that an update changes, to restore them."""

from typing import Any

import torch

from vllm_dfloat.device.ops import PackedWeight
from vllm_dfloat.integration.layers import method
from vllm_dfloat.integration.layers.placeholder import WeightPlaceholder
from vllm_dfloat.integration.seam import expert_kernels, layer_kinds, layerwise, places

# Attributes of a module that are restored in another way, or never change.
_OTHERS = frozenset(
    [
        "_parameters",
        "_buffers",
        "_modules",
        "_non_persistent_buffers_set",
        "_do_torchao_reload",  # vLLM's own, for the time of a reload
        method.PACKED,
    ]
)


class SavedWeights:
    """Old values of changed weights, kept on the host: a GPU has no room for two models.

    On a CPU, and where --cpu-offload-gb holds it on the host, a compressed weight is kept by reference, and only while
    the update lasts; not one that is copied to the device ahead of use, whose place is written to.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        """Save the modules' attributes by reference, and copies of the small tensors that a reload writes in place."""
        self._attributes = {layer: _attributes(layer) for layer in model.modules()}
        self._packed: dict[torch.nn.Module, dict[str, PackedWeight]] = {}
        self._kernels: dict[torch.nn.Module, dict[str, Any]] = {}
        self._tensors: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for layer in model.modules():
            for tensor in layerwise.written_in_place(layer).values():
                self.save_tensor(tensor)

    def save_tensor(self, tensor: torch.Tensor) -> None:
        """Save the values of a tensor before it is written; later calls for the same tensor do nothing."""
        has_values = not isinstance(tensor, WeightPlaceholder) and not tensor.is_meta
        if has_values and id(tensor) not in self._tensors:
            self._tensors[id(tensor)] = tensor, tensor.detach().to("cpu", copy=True)

    def save_layer(self, layer: torch.nn.Module) -> None:
        """Save the weights of a layer before a reload changes it; later calls for the same layer do nothing."""
        if layer in self._packed:
            return
        held = method.weights_of(layer)
        self._packed[layer] = {
            name: packed
            if places.is_on_host(layer, name) and packed.staged is None
            else packed.to("cpu")
            for name, packed in held.items()
        }
        if layer_kinds.is_experts(layer):
            self._kernels[layer] = expert_kernels.kernel_of_experts(layer)
        for tensor in layerwise.set_aside(layer).values():
            self.save_tensor(tensor)

    @torch.no_grad()
    def put_back(self, model: torch.nn.Module, model_config: Any) -> None:
        """Restore the saved weights of every layer."""
        for tensor, values in self._tensors.values():
            tensor.data.copy_(values)
        for layer, before in self._attributes.items():
            _set_attributes(layer, before)
        for layer, held in self._packed.items():
            for name, packed in held.items():
                device = layer.__dict__[method.desc_name(name)].device
                method.hold(layer, packed.to(device), name)
        for experts, kernel in self._kernels.items():
            for name, value in kernel.items():
                setattr(experts.quant_method, name, value)
        if self._packed:
            layerwise.process_attention(model, model_config)

    def left_without_values(self) -> list[str]:
        """Return the attributes of modules that had values before the update and are on the meta device now.

        Some models compute tensors from their weights at the end of load_weights (DFlash drafts stack their norms). In
        a reload the weights that have not arrived are on the meta device then.
        """
        return [
            f"{type(layer).__name__}.{name}"
            for layer, before in self._attributes.items()
            for name, value in _attributes(layer).items()
            if _is_meta(value) and not _is_meta(before.get(name))
        ]


def _is_meta(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta


def _attributes(layer: torch.nn.Module) -> dict[str, Any]:
    return {name: value for name, value in layer.__dict__.items() if name not in _OTHERS}


def _set_attributes(layer: torch.nn.Module, before: dict[str, Any]) -> None:
    """Restore what processing and load_weights set beside parameters: flags, a copy for a CPU, derived tensors."""
    for name in _attributes(layer).keys() - before.keys():
        del layer.__dict__[name]
    layer.__dict__.update(before)
