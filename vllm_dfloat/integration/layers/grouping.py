"""Form groups that are decoded in one launch: the linear layers of each transformer block."""

from collections import defaultdict
from typing import Any

import torch

from vllm_dfloat.checkpoint.names import innermost_block
from vllm_dfloat.codec.descriptor import MAX_MEMBERS, ROW_WORDS
from vllm_dfloat.codec.layout import TILE_WEIGHTS
from vllm_dfloat.device.group_tables import Shape
from vllm_dfloat.device.scratch import scratch
from vllm_dfloat.integration.layers import linear_op
from vllm_dfloat.integration.layers import method as packed
from vllm_dfloat.integration.layers.layouts import BY_NAME, Groups
from vllm_dfloat.integration.layers.linear import DFloat11LinearMethod


def group_layers(model: torch.nn.Module) -> None:
    """Group the compressed linear layers of each transformer block, as the option `granularity` says.

    Called when the whole model is loaded. A single layer, or more layers than a launch takes, stay ungrouped. Where a
    block has layers in several layouts, there is a launch for each layout.
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
        and BY_NAME[method.layout].groups is not None
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
    device = layers[0].weight.device
    return all(numel <= _groups_of(layer).max_numel(device) for layer in layers)


def _group(layers: list[Any]) -> None:
    """Group the layers of a block: those of one layout are decoded in one launch, each group beside the others."""
    by_layout: dict[str, list[Any]] = defaultdict(list)
    for layer in layers:
        by_layout[layer.quant_method.layout].append(layer)
    device = layers[0].weight.device
    shape = len(layers) + len(by_layout), ROW_WORDS  # each table has a row more than members
    tables = torch.empty(shape, dtype=torch.int64, device=device)
    sizes = {name: sum(map(_tiles, group)) for name, group in by_layout.items()}
    row = tile = 0
    for name, group in by_layout.items():
        _fill(tables[row : row + len(group) + 1], group)
        place = linear_op.Place(tile, sum(sizes.values()), tile, sizes[name], row)
        _place(group, place)
        row, tile = row + len(group) + 1, tile + sizes[name]
    for layer in layers:
        layer.__dict__[packed.TABLES] = tables  # not a buffer: other code could write to that
        layer.quant_method.group_tables = tables.cpu()
    scratch.require(device, tile * TILE_WEIGHTS)
    layers[0].quant_method.reserve_scratch(device)


def _fill(table: torch.Tensor, group: list[Any]) -> None:
    """Fill the table of one launch."""
    descs = [layer.dfloat11_desc for layer in group]
    rows = _groups_of(group[0]).table_rows(table, descs, _shapes(group))
    table.copy_(torch.tensor(rows, dtype=torch.int64, device="cpu"))


def _place(group: list[Any], start: linear_op.Place) -> None:
    """Tell the layers of one launch their places, given that of the first one."""
    shapes = [number for shape in _shapes(group) for number in shape]
    first = start.first_tile
    for layer in group:
        layer.quant_method.place_in_block = (*start._replace(first_tile=first), *shapes)
        first += _tiles(layer)


def _shapes(group: list[Any]) -> list[Shape]:
    return [(layer.quant_method.rows, layer.quant_method.cols) for layer in group]


def _tiles(layer: Any) -> int:
    method = layer.quant_method
    return BY_NAME[method.layout].scratch_numel(method.rows, method.cols) // TILE_WEIGHTS


def _groups_of(layer: Any) -> Groups:
    groups = BY_NAME[layer.quant_method.layout].groups
    assert groups is not None  # as `_can_be_grouped` says
    return groups
