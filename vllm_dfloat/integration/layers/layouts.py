"""The layouts in which compressed weights can be held: one name, one set of functions with the same signatures each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from vllm_dfloat.device import ops, unit_resident


@dataclass(frozen=True)
class Layout:
    """What linear layers and embeddings need of a layout. Descriptors of all layouts are int64 [ops.DESC_LENGTH].

    Attributes:
        pack: (weight, name) -> the weight, compressed, on its device.
        decode: (desc, rows, cols, out, status): the whole matrix into the scratch; called inside `vllm_dfloat::linear`.
        lookup: (desc, ids, rows, cols) -> BF16 [n, cols]: chosen rows; called inside `vllm_dfloat::lookup`.
        unpack: (packed) -> BF16 [rows, cols], every status checked.
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
