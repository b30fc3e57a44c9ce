"""Decode a group of matrices of the packed layout in one launch, one after the other in the output.

Of the table (group_table.py), the word of a member is the salt of its descriptor. Its tiles are those of the output.
"""

import torch
import triton
import triton.language as tl

from vllm_dfloat.codec import descriptor
from vllm_dfloat.kernels.configs import config_of
from vllm_dfloat.kernels.group_table import WORDS, _member_of_program, _open_table
from vllm_dfloat.kernels.packed_decode import _decode_tiles
from vllm_dfloat.kernels.tiles import TILE_WEIGHTS, num_warps


@triton.jit
def _tiles_of_program(table_ptr, num_members, num_tiles, salt, TILES: tl.constexpr):
    """Return whether the table is sound, and this program's member: its number, the address of its descriptor, its
    first tile and number of tiles, and the program's index within it.

    If the table is not sound, the whole output is one member, with the table in place of a descriptor.
    """
    is_sound, index, is_member, address, first, after, _word = _open_table(
        table_ptr, num_members, salt
    )
    programs = (after - first + (TILES - 1)) // TILES
    member, place = _member_of_program(programs, is_member)
    is_it = index == member
    first_tile = tl.sum(tl.where(is_it, first, 0), axis=0)
    tiles = tl.sum(tl.where(is_it, after - first, 0), axis=0)
    desc = tl.sum(tl.where(is_it, address, 0), axis=0)
    desc = tl.where(is_sound, desc, table_ptr.to(tl.int64))
    member = tl.where(is_sound, member, 0)
    first_tile = tl.where(is_sound, first_tile, 0)
    tiles = tl.where(is_sound, tiles, num_tiles)
    return (
        is_sound, member, desc, first_tile, tiles, tl.where(is_sound, place, tl.program_id(0))
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_members", "num_tiles", "salt"])
def _decode_group_kernel(
    table_ptr,  # int64[num_members + 1, 4]       see group_table.py
    out_ptr,  # uint32[num_tiles * 1024]        pairs of BF16, whole tiles
    status_ptr,  # int32[num_tiles]               0, or a sum of STATUS_* bits
    num_members,  # int32
    num_tiles,  # int32                          of all members
    salt,  # int64                               of the seals of the rows, see vllm_dfloat/codec/descriptor.py
    TILES: tl.constexpr,
):
    """Decode TILES tiles of one member per program. Grid (at least the sum of ceil(member's tiles / TILES),)."""
    is_sound, member, desc, first_tile, tiles, place = _tiles_of_program(
        table_ptr, num_members, num_tiles, salt, TILES
    )
    if member < num_members:
        tile = (place * TILES + tl.arange(0, TILES))[:, None]
        tile = tl.minimum(tile, tiles - 1).to(tl.int64)  # times 2048 it passes 2**31
        start = first_tile.to(tl.int64)
        _decode_tiles(
            desc.to(tl.pointer_type(tl.int64)), tl.load(table_ptr + member * WORDS + 2), tile,
            tiles.to(tl.int64),
            out_ptr + start * (TILE_WEIGHTS // 2), status_ptr + start,
            TILES, is_sound,
        )  # fmt: skip


def decode_group(
    table: torch.Tensor,
    num_tiles: int,
    out: torch.Tensor,
    status: torch.Tensor,
    tiles_per_program: int = 0,
) -> None:
    """Decode the matrices that `table` lists into `out`; allocates nothing and does not wait for the device.

    Args:
        table: int64 [members + 1, 4] on the device, see group_table.py; at most MAX_MEMBERS members (descriptor.py),
            none empty.
        num_tiles: tiles in all, as in the table's last row.
        out: BF16, flat, contiguous, at least `num_tiles * 2048` elements, aligned to 16 bytes.
        status: int32 [>= num_tiles]; 0 per tile, or a sum of STATUS_* bits.
        tiles_per_program: 0 for the value in configs.py.
    """
    num_members = table.shape[0] - 1
    tiles = tiles_per_program or config_of(out.device).decode_tiles_per_program
    grid = (triton.cdiv(num_tiles, tiles) + num_members,)  # a member's last one may be partial
    salt = descriptor.salt(table.data_ptr(), num_tiles)
    _decode_group_kernel[grid](
        table, out.view(torch.uint32), status, num_members, num_tiles, salt, tiles,
        num_warps=num_warps(tiles),
    )  # fmt: skip
