"""The tensors of a DFloat11 checkpoint as plain BF16 under their original names, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from vllm_dfloat.checkpoint.members import Member, plan, shapes_of
from vllm_dfloat.checkpoint.reader import Dfloat11Checkpoint
from vllm_dfloat.checkpoint.shapes import Shapes
from vllm_dfloat.codec.arrays import Bits
from vllm_dfloat.dfloat11.decode import decode_range, decode_unit
from vllm_dfloat.dfloat11.unit import Unit
from vllm_dfloat.dfloat11.unit_entry import UnitEntry
from vllm_dfloat.storage.pieces import piece_weights
from vllm_dfloat.storage.stored_tensor import StoredTensor

if TYPE_CHECKING:
    import torch

Decode = Callable[[Unit, int, int], "torch.Tensor"]

_TORCH_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32",
    "I32": "int32", "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16",
    "F32": "float32", "F64": "float64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip


def iter_weights(
    checkpoint: Dfloat11Checkpoint,
    shapes: Shapes | None = None,
    skip: Callable[[str], bool] | None = None,
) -> Iterator[tuple[str, Bits]]:
    """Yield (name, bits) of every tensor; BF16 as uint16, other dtypes as NumPy has them.

    Weights of units are decoded one at a time, each into memory of its own. See `weights` for the order and the
    arguments.
    """
    shapes = shapes_of(checkpoint) if shapes is None else shapes
    for name, _, bits in typed_weights(checkpoint, shapes, skip):
        yield name, bits


def weights(
    checkpoint: Dfloat11Checkpoint,
    shapes: Shapes | None = None,
    skip: Callable[[str], bool] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of every tensor of the checkpoint, compressed ones decoded into memory of their own.

    The order, the arguments and the errors are those of `lazy_weights`.
    """
    from vllm_dfloat.checkpoint.lazy_weight import LazyWeight

    for name, tensor in lazy_weights(checkpoint, shapes, skip):
        yield name, tensor.decode() if isinstance(tensor, LazyWeight) else tensor


def lazy_weights(
    checkpoint: Dfloat11Checkpoint,
    shapes: Shapes | None = None,
    skip: Callable[[str], bool] | None = None,
    decode: Decode | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of every tensor of the checkpoint; a compressed one is a LazyWeight, decoded while copied.

    All tensors of a transformer block come together: first the weights of its unit in storage order, each before the
    bias of its module (a loader that counts what a layer has received must see the weight first), then the others.

    Args:
        checkpoint: an open checkpoint.
        shapes: module path -> (out_features, in_features); from `shapes_of` if None.
        skip: names for which it returns True are not yielded.
        decode: (unit, start, stop) -> weights start..stop of the unit, BF16 [stop - start]; by default on the CPU.

    Raises:
        FormatError: a unit is damaged or does not fit `shapes`: before the first tensor if no decoding is needed to
            see it, else when the weight is copied.
    """
    shapes = shapes_of(checkpoint) if shapes is None else shapes
    yield from planned_weights(checkpoint, plan(checkpoint, shapes, skip), decode)


def planned_weights(
    checkpoint: Dfloat11Checkpoint, items: Iterable[Member | StoredTensor], decode: Decode | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Do as `lazy_weights` for what `plan` has returned."""
    import torch

    checkpoint.validate()
    units: dict[str, _OpenUnit] = {}
    for item in items:
        if isinstance(item, StoredTensor):
            bits = item.bits()
            flat = torch.from_numpy(bits.reshape(-1).view(np.uint8))
            yield (
                item.name,
                flat.view(getattr(torch, _TORCH_DTYPES[item.dtype])).reshape(bits.shape),
            )
            continue
        if item.entry.name not in units:
            units = {item.entry.name: _OpenUnit(item.entry, decode or _on_cpu)}
        yield item.name, units[item.entry.name].lazy(item)


class _OpenUnit:
    """A unit that its weights share: opened when the first is copied, closed when the last is deleted."""

    def __init__(self, entry: UnitEntry, decode: Decode) -> None:
        self._entry = entry
        self._decode = decode
        self._unit: Unit | None = None

    def lazy(self, member: Member) -> torch.Tensor:
        from vllm_dfloat.checkpoint.lazy_weight import LazyWeight

        return LazyWeight(partial(self._read, member.start), member.shape)

    def _read(self, base: int, start: int, stop: int) -> torch.Tensor:
        if self._unit is None:
            self._unit = self._entry.load()
        return self._decode(self._unit, base + start, base + stop)


def _on_cpu(unit: Unit, start: int, stop: int) -> torch.Tensor:
    import torch

    return torch.from_numpy(decode_unit(unit, start, stop)).view(torch.bfloat16)


def typed_weights(
    checkpoint: Dfloat11Checkpoint,
    shapes: Shapes | None = None,
    skip: Callable[[str], bool] | None = None,
) -> Iterator[tuple[str, str, Bits]]:
    """Yield (name, safetensors dtype, bits) in the order of `weights`, each decoded into memory of its own.

    Needs no model: without `shapes` every decoded weight is [1, n]. Files are read, not mapped: truncating a mapped
    file would kill the process.
    """
    items = plan(checkpoint, shapes, skip)
    checkpoint.validate()
    unit: Unit | None = None
    for item in items:
        if isinstance(item, StoredTensor):
            yield item.name, item.dtype, item.read()
            continue
        if unit is None or unit.name != item.entry.name:
            unit = item.entry.open()
        yield item.name, "BF16", _decoded(unit, item)


def _decoded(unit: Unit, member: Member) -> Bits:
    """Return a weight of a unit that stays in its file; reads bounded pieces of it."""
    out = np.empty(member.stop - member.start, np.uint16)
    step = piece_weights()
    for first in range(member.start, member.stop, step):
        stop = min(first + step, member.stop)
        out[first - member.start : stop - member.start] = decode_range(unit, first, stop)
    return out.reshape(member.shape)
