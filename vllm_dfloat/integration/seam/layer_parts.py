"""The parts of a layer's parameters that arrive together: a projection of a fused layer, a matrix of an expert."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vllm_dfloat.integration.seam import layer_kinds


@dataclass(frozen=True)
class Part:
    """Rows of a parameter that arrive together.

    Attributes:
        label: name of the part ("k_proj", "expert 3 gate_proj"), or "" if it is the whole parameter.
        start, stop: the rows, stop excluded; all dimensions but the last are flattened into rows.
        is_whole: True if every expected element must arrive, False if one is enough.
        due: number of elements expected, if padding for a kernel stays empty; None: all of them.
    """

    label: str
    start: int
    stop: int
    is_whole: bool = True
    due: int | None = None


def num_rows(parameter: torch.Tensor) -> int:
    """Return the number of rows of a parameter, all dimensions but the last flattened; of a 1-D one its elements."""
    return parameter.numel() // (parameter.shape[-1] if parameter.dim() > 1 else 1)


def parts_of(
    layer: Any, path: str, name: str, parameter: torch.Tensor, fused: Mapping[str, list[str]]
) -> Iterator[Part]:
    """Yield the parts of a parameter that must arrive; none for kinds of layers that vLLM's own check covers."""
    count = num_rows(parameter)
    if layer_kinds.is_experts(layer):
        yield from _expert_parts(layer, name, parameter)
    elif layer_kinds.is_vocabulary(layer):
        # The rows that pad the vocabulary never arrive, and a rank may have only such rows.
        yield Part("", 0, min(count, layer.shard_indices.num_org_elements))
    elif layer_kinds.is_linear(layer):
        yield from _linear_parts(layer, path, count, fused, is_weight=name in ("weight", "bias"))


def _linear_parts(
    layer: Any, path: str, count: int, fused: Mapping[str, list[str]], is_weight: bool
) -> Iterator[Part]:
    sizes: list[int] = (
        getattr(layer, "output_partition_sizes", None) or getattr(layer, "output_sizes", None) or []
    )
    if not is_weight or len(sizes) < 2 or sum(sizes) != count:
        yield Part("", 0, count, is_whole=is_weight)
        return
    names = fused.get(path.rpartition(".")[2], ())
    start = 0
    for i, size in enumerate(sizes):
        label = names[i] if len(names) == len(sizes) else f"part {i + 1} of {len(sizes)}"
        yield Part(label, start, start + size)
        start += size


def _expert_parts(layer: Any, name: str, parameter: torch.Tensor) -> Iterator[Part]:
    """Yield the parts of one parameter of routed experts: per expert of this rank the matrices or biases it holds.

    Padding for a kernel may lie between gate and up. A checkpoint with both in one tensor then fills the two halves
    unequally, so at least one element of each must arrive, and all elements of both together.
    """
    count = parameter.shape[0]
    kinds = layer_kinds.expert_matrices(layer).get(name, [])
    if not kinds or count != layer.local_num_experts:
        return
    each = num_rows(parameter) // count
    if each % len(kinds):
        kinds = kinds[:1]
    step = each // len(kinds)
    due = layer_kinds.numel_of_expert(layer, name)
    is_padded = len(kinds) > 1 and layer_kinds.has_padded_experts(layer)
    for local, expert in enumerate(layer_kinds.local_experts(layer)):
        first = local * each
        for i, kind in enumerate(kinds):
            label, start = f"expert {expert} {kind}", first + i * step
            if is_padded or due is None:
                yield Part(label, start, start + step, is_whole=False)
            else:
                yield Part(label, start, start + step, due=due // len(kinds))
        if is_padded and due is not None:
            yield Part(f"expert {expert}", first, first + each, due=due)
