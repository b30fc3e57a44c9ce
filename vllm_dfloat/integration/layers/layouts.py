"""The layouts in which compressed weights can be held: for each name a set of functions with the same signatures."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from vllm_dfloat.device import ops, unit_resident


@dataclass(frozen=True)
class Layout:
    """The functions that linear layers and embeddings use. Every layout's descriptors are int64 [ops.DESC_LENGTH].

    Attributes:
        pack: (weight, name) -> the compressed weight on the same device.
        decode: (desc, rows, cols, out, status): the whole matrix into the scratch; called inside `vllm_dfloat::linear`.
        lookup: (desc, ids, rows, cols) -> BF16 [n, cols]: chosen rows; called inside `vllm_dfloat::lookup`.
        unpack: (packed) -> BF16 [rows, cols]; checks every status and all bytes.
    """

    pack: Callable[[torch.Tensor, str], ops.PackedWeight]
    decode: Callable[[torch.Tensor, int, int, torch.Tensor, torch.Tensor], None]
    lookup: Callable[[torch.Tensor, torch.Tensor, int, int], torch.Tensor]
    unpack: Callable[[ops.PackedWeight], torch.Tensor]


BY_NAME: Mapping[str, Layout] = {
    "packed": Layout(
        ops.pack,
        ops.launch_decode,
        ops.decode_rows,
        ops.unpack,
    ),
    "dfloat11": Layout(
        unit_resident.pack,
        unit_resident.launch_decode,
        unit_resident.decode_rows,
        unit_resident.unpack,
    ),
}
