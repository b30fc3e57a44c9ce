"""Decode a group of matrices of the fast layout in one launch, one after the other in the output.

Of the table (group_table.py), the word of a member is its size, rows * 2**32 + cols. A member lies row by row from its
first tile of the output on, and has a status word for each tile of the fast layout, from the status word of its first
tile on; it has so many tiles of the output that these fit too.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from vllm_dfloat.codec import descriptor
from vllm_dfloat.kernels.fast_decode import _decode_block, constants_of, num_programs
from vllm_dfloat.kernels.fast_planes import LOW_BYTES, NAN, TILE_COLS
from vllm_dfloat.kernels.group_table import _member_of_program, _open_table
from vllm_dfloat.kernels.tiles import STATUS_DESCRIPTOR, TILE_WEIGHTS

_PLACE_FACTOR = tl.constexpr(descriptor.signed(descriptor.PLACE_FACTOR))
_SIZE_FACTOR = tl.constexpr(descriptor.signed(descriptor.SIZE_FACTOR))


@triton.jit
def _store_nan_everywhere(out_ptr, status_ptr, num_tiles):
    """Make the whole output NaN; the programs share its tiles."""
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        place = out_ptr + tl.cast(tile, tl.int64) * TILE_WEIGHTS + tl.arange(0, TILE_WEIGHTS)
        tl.store(place, tl.full([TILE_WEIGHTS], NAN, tl.uint16))
        tl.store(status_ptr + tile, STATUS_DESCRIPTOR)


@triton.jit(do_not_specialize=["num_members", "num_tiles", "salt", "base_salt", "low_bytes"])
def _fast_group_kernel(
    table_ptr,  # int64[num_members + 1, 4]       see group_table.py
    out_ptr,  # uint16[num_tiles * 2048]        BF16 bits
    status_ptr,  # int32[num_tiles]               0, or a STATUS_* bit
    num_members,  # int32
    num_tiles,  # int32                          of the output, of all members
    salt,  # int64                          of the seals of the rows
    base_salt,  # int64                          of a descriptor at place 0 and of size 0
    low_bytes,  # int32                          0x00FF00FF, see `_four_weights`
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    TILES: tl.constexpr,
    AT_ONCE: tl.constexpr,
    COLS_FACTOR: tl.constexpr,
    WHOLE: tl.constexpr,
    PRMT: tl.constexpr,
):
    """Decode ROWS rows of TILES tiles of 128 columns of one member per program.

    Grid (at least the sum of the members' blocks of that size,). The parameters are those of `_fast_decode_kernel`;
    COLS_FACTOR and WHOLE hold for every member.
    """
    is_sound, index, is_member, address, first, _after, size = _open_table(
        table_ptr, num_members, salt
    )
    if is_sound:
        rows = (size >> 32).to(tl.int32)
        blocks = (size.to(tl.int32) + (TILES * TILE_COLS - 1)) // (TILES * TILE_COLS)
        programs = tl.where(is_member, (rows + (ROWS - 1)) // ROWS * blocks, 0)
        member, place = _member_of_program(programs, is_member)
        if member < num_members:
            is_it = index == member
            desc = tl.sum(tl.where(is_it, address, 0), axis=0)
            start = tl.sum(tl.where(is_it, first, 0), axis=0).to(tl.int64)
            shape = tl.sum(tl.where(is_it, size, 0), axis=0)
            across = tl.sum(tl.where(is_it, blocks, 0), axis=0)
            num_rows = (shape >> 32).to(tl.int32)
            _decode_block(
                desc.to(tl.pointer_type(tl.int64)), out_ptr + start * TILE_WEIGHTS, status_ptr + start,
                num_rows, shape.to(tl.int32), base_salt + desc * _PLACE_FACTOR + shape * _SIZE_FACTOR, low_bytes,
                place // across * ROWS, place % across * TILES, num_rows,
                ROWS, STEP, TILES, AT_ONCE, COLS_FACTOR, WHOLE, PRMT,
            )  # fmt: skip
    else:
        _store_nan_everywhere(out_ptr, status_ptr, num_tiles)


def decode_group(
    table: torch.Tensor,
    num_tiles: int,
    shapes: Sequence[tuple[int, int]],
    out: torch.Tensor,
    status: torch.Tensor,
    *,
    prmt: bool | None = None,
) -> None:
    """Decode the matrices that `table` lists into `out`; allocates nothing and does not wait for the device.

    Args:
        table: int64 [members + 1, 4] on the device, see above; at most MAX_MEMBERS members (descriptor.py), none empty.
        num_tiles: tiles in all, as in the table's last row.
        shapes: rows and cols of the members, as in the table.
        out: BF16, flat, contiguous, at least `num_tiles * 2048` elements, aligned to 16 bytes.
        status: int32 [>= num_tiles]; 0 per tile of a member, or a STATUS_* bit.
        prmt: join bytes with PRMT; None: unless Triton interprets, or on an AMD GPU. The bits are the same.
    """
    each = [constants_of(*shape, out.device, prmt) for shape in shapes]
    constants = each[0] | {
        "COLS_FACTOR": min(one["COLS_FACTOR"] for one in each),
        "WHOLE": all(one["WHOLE"] for one in each),
    }
    programs = sum(num_programs(*shape, constants) for shape in shapes)
    salt = descriptor.salt(table.data_ptr(), num_tiles)
    _fast_group_kernel[(programs,)](
        table, out.view(torch.uint16), status, len(shapes), num_tiles, salt, descriptor.salt(0, 0), LOW_BYTES,
        **constants,
    )  # fmt: skip
