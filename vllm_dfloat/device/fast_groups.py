"""The bridge for groups of the fast layout: decode several matrices in one launch, one after the other.

The functions are those of the packed layout in groups.py.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch

from vllm_dfloat.codec import fast_layout
from vllm_dfloat.codec.layout import ALIGNMENT, TILE_WEIGHTS
from vllm_dfloat.device import fast_ops, ops
from vllm_dfloat.device.checks import check_tensor
from vllm_dfloat.device.group_tables import (
    Rows,
    Shape,
    check_table,
    desc_at,
    make_table,
    sealed_rows,
    sound_rows,
)


def first_tiles(shapes: Sequence[Shape]) -> list[int]:
    """Return the first tile, of 2048 weights, of each matrix in the decoded output, then the number of all tiles."""
    sizes = (fast_ops.scratch_numel(*shape) // TILE_WEIGHTS for shape in shapes)
    return list(accumulate(sizes, initial=0))


def group_table(descs: Sequence[torch.Tensor], shapes: Sequence[Shape]) -> torch.Tensor:
    """Return the table that `decode_group` reads, on the device of the descriptors; see `make_table`."""
    return make_table(descs, shapes, table_rows)


def table_rows(table: torch.Tensor, descs: Sequence[torch.Tensor], shapes: Sequence[Shape]) -> Rows:
    """Return the rows that a table of these members must hold (kernels/fast_group.py)."""
    sizes = [fast_layout.size(*shape) for shape in shapes]
    return sealed_rows(table.data_ptr(), descs, first_tiles(shapes), sizes)


def decode_group(
    table: torch.Tensor,
    shapes: Sequence[Shape],
    out: torch.Tensor,
    status: torch.Tensor,
) -> None:
    """Decode the matrices that `table` lists; does not wait for the device, allocates nothing on a GPU.

    Args:
        table: from `group_table`.
        shapes: rows and cols of the members, as `group_table` got them.
        out: BF16, flat, contiguous, at least 2048 elements for each of `first_tiles(shapes)[-1]` tiles, aligned to 16
            bytes. A member begins with its first tile.
        status: int32, at least as many as tiles; a member's words begin with its first tile, one for each tile of the
            fast layout: 0, or a STATUS_* bit. The others are left as they were.

    Raises:
        UnsupportedError: a tensor of another dtype, size, device or alignment.
        FormatError: on a CPU, the table or a descriptor was changed.
    """
    check_table("decode_fast_group", table)
    num_tiles, device = first_tiles(shapes)[-1], table.device
    numel = num_tiles * TILE_WEIGHTS
    check_tensor("decode_fast_group: out", out, torch.bfloat16, numel, device, ALIGNMENT)
    check_tensor("decode_fast_group: status", status, torch.int32, num_tiles, device)
    launch_decode_group(table, num_tiles, shapes, out, status)


def launch_decode_group(
    table: torch.Tensor,
    num_tiles: int,
    shapes: Sequence[Shape],
    out: torch.Tensor,
    status: torch.Tensor,
) -> None:
    """Do what `decode_group` does without its checks: for forward passes, whose buffers the scratch arena made."""
    if ops.uses_triton(out.device):
        from vllm_dfloat.kernels.fast_group import decode_group as decode_group_triton

        decode_group_triton(table, num_tiles, shapes, out, status)
        return
    for address, first, size, _ in sound_rows(table, num_tiles)[:-1]:
        shape = size >> 32, size & 0xFFFFFFFF
        at = out[first * TILE_WEIGHTS :]
        fast_ops.launch_decode(desc_at(address), *shape, at, status[first:])
