"""Form groups that are decoded in one launch: the linear layers of each transformer block."""

from collections import defaultdict
from typing import Any

import torch

from vllm_dfloat.checkpoint.names import innermost_block
from vllm_dfloat.codec.descriptor import MAX_MEMBERS
from vllm_dfloat.codec.layout import TILE_WEIGHTS
from vllm_dfloat.device import groups
from vllm_dfloat.device.scratch import scratch
from vllm_dfloat.integration.layers import method as packed
from vllm_dfloat.integration.layers.layouts import BY_NAME
from vllm_dfloat.integration.layers.linear import DFloat11LinearMethod


def group_layers(model: torch.nn.Module) -> None:
    """Group the compressed linear layers of each transformer block, as the option `granularity` says.

    Called when the whole model is loaded. A single layer, or more layers than a launch takes, stay ungrouped.
    """
    found: dict[str, list[Any]] = defaultdict(list)
    for name, layer in model.named_modules():
        block = innermost_block(name)
        if block and _can_be_grouped(layer):
            found[block].append(layer)
    for layers in found.values():
        if _is_wanted(layers):
            _group(layers)


def _can_be_grouped(layer: Any) -> bool:
    method = getattr(layer, "quant_method", None)
    weight = packed.packed_of(layer)
    return (
        isinstance(method, DFloat11LinearMethod)
        and BY_NAME[method.layout].has_groups
        and weight is not None
        and weight.rows * weight.cols > 0
    )


def _is_wanted(layers: list[Any]) -> bool:
    if not 2 <= len(layers) <= MAX_MEMBERS:
        return False
    granularity = layers[0].quant_method.granularity
    if granularity != "auto":
        return bool(granularity == "block")
    numel = sum(layer.quant_method.rows * layer.quant_method.cols for layer in layers)
    return bool(numel <= groups.max_numel(layers[0].weight.device))


def _group(layers: list[Any]) -> None:
    device = layers[0].weight.device
    shapes = [(layer.quant_method.rows, layer.quant_method.cols) for layer in layers]
    starts = groups.first_tiles(shapes)
    table = groups.group_table([layer.dfloat11_desc for layer in layers], shapes)
    for layer, start in zip(layers, starts, strict=False):
        layer.__dict__[packed.GROUP] = table  # not a buffer: other code could write to that
        layer.quant_method.place_in_group = start, starts[-1]
        layer.quant_method.group_table = table.cpu()
    scratch.require(device, starts[-1] * TILE_WEIGHTS)
    layers[0].quant_method.reserve_scratch(device)
