"""A stored weight that is read when it is needed: the ranges of it that a view of it takes, in bounded pieces.

A view is given as a meta tensor: shape, strides and offset in elements of its dtype, as in a storage of all weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

PIECE_WEIGHTS = 1 << 23  # decoded at a time: 16 MiB of BF16
GAP_WEIGHTS = 1 << 16  # unused weights between two rows that are decoded rather than read around
WEIGHT_BYTES = 2

Read = Callable[[int, int], torch.Tensor]


class FlatWeight:
    """A stored weight: its flat BF16 weights, read when needed.

    Attributes:
        read: (start, stop) -> weights start..stop, BF16 [stop - start], on any device.
        numel: number of weights.
        value: all weights [numel] on the CPU, once somebody has asked for their memory.
    """

    def __init__(self, read: Read, numel: int) -> None:
        self.read, self.numel = read, numel
        self.value: torch.Tensor | None = None

    def memory(self) -> torch.Tensor:
        """Return all weights in memory that every view shares from now on."""
        if self.value is None:
            value = torch.empty(self.numel, dtype=torch.bfloat16, device="cpu")
            for start in range(0, self.numel, PIECE_WEIGHTS):
                stop = min(start + PIECE_WEIGHTS, self.numel)
                value[start:stop].copy_(self.read(start, stop))
            self.value = value
        return self.value

    def view(self, meta: torch.Tensor) -> torch.Tensor:
        """Return the elements at which a meta tensor points, in one range that is decoded for this alone."""
        size, stride, offset = meta.shape, meta.stride(), meta.storage_offset()
        if not meta.numel():
            return torch.empty(size, dtype=meta.dtype)
        if self.value is not None:
            storage = self.value.untyped_storage()
            return torch.empty(0, dtype=meta.dtype).set_(storage, offset, size, stride)
        width = meta.element_size()
        at_once = max(width, WEIGHT_BYTES)  # elements must begin where memory can be viewed as them
        first = offset * width // at_once * at_once
        last = math.ceil((offset + _span(meta)) * width / at_once) * at_once
        flat = self.read(first // WEIGHT_BYTES, last // WEIGHT_BYTES)
        if flat.storage_offset() * WEIGHT_BYTES % at_once:
            flat = flat.clone()
        flat = flat.view(meta.dtype)
        return flat.as_strided(size, stride, flat.storage_offset() + offset - first // width)

    def copy(self, meta: torch.Tensor, out: torch.Tensor) -> None:
        """Copy the elements at which a meta tensor points into `out`, of its shape, piece by piece."""
        if self.value is not None:
            out.copy_(self.view(meta))
            return
        for part, piece in _pieces(out, meta):
            part.copy_(self.view(piece))


def _span(meta: torch.Tensor) -> int:
    """Return the length of the range of storage that a tensor with elements lies in."""
    return 1 + sum(
        (size - 1) * stride for size, stride in zip(meta.shape, meta.stride(), strict=True)
    )


def _pieces(out: torch.Tensor, meta: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Split two tensors of the same shape alike, until each part of `meta` can be read as one range."""
    if not meta.numel():
        return
    piece, gap = (
        count * WEIGHT_BYTES // meta.element_size() for count in (PIECE_WEIGHTS, GAP_WEIGHTS)
    )
    extents = [(size - 1) * stride for size, stride in zip(meta.shape, meta.stride(), strict=True)]
    dim = max(range(len(extents)), key=extents.__getitem__, default=0)
    span = 1 + sum(extents)
    if not extents or not extents[dim]:
        yield out, meta
        return
    stride = meta.stride(dim)
    inner = span - extents[dim]  # range of one index of that dimension
    has_gaps = stride - inner > gap
    if span <= piece and not has_gaps:
        yield out, meta
        return
    step = 1 if has_gaps else max(1, (piece - inner) // stride + 1)
    for first in range(0, meta.shape[dim], step):
        length = min(step, meta.shape[dim] - first)
        yield from _pieces(out.narrow(dim, first, length), meta.narrow(dim, first, length))
