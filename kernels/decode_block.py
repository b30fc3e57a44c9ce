"""Decode all matrices of a transformer block in one launch, one behind the other.

The block's matrices are described by a table whose size and content do not change when their weights do:

    table  int64[num_members + 1, 2]  address of a matrix's descriptor, its first tile in the output; then 0, all tiles

The addresses are those of descriptors (kernels/tiles.py), not of payloads, so a reload that rewrites descriptors in
place is seen by graphs captured before it.
"""

import torch
import triton
import triton.language as tl

from vllm_dfloat.codec import layout
from vllm_dfloat.kernels.compile_spec import CompileSpec
from vllm_dfloat.kernels.configs import DEFAULT, config_of
from vllm_dfloat.kernels.decode import _decode_tiles
from vllm_dfloat.kernels.tiles import TILE_WEIGHTS, num_warps

MAX_MEMBERS = 16
_ROWS = tl.constexpr(
    2 * MAX_MEMBERS
)  # a power of two above MAX_MEMBERS, for the table and its last row


@triton.jit
def _member_of_program(table_ptr, num_members, TILES: tl.constexpr):
    """Return the member that this program works for, its first tile and number of tiles, and the program's place in it.

    A program works for one member, so each member gets whole programs. Programs behind the last one get num_members.
    """
    index = tl.arange(0, _ROWS)
    is_member = index < num_members
    first = tl.load(table_ptr + index * 2 + 1, mask=is_member, other=0)
    after = tl.load(table_ptr + index * 2 + 3, mask=is_member, other=0)
    programs = (after - first + (TILES - 1)) // TILES
    ends = tl.cumsum(programs, axis=0)
    pid = tl.program_id(0).to(tl.int64)
    is_before = is_member & (ends <= pid)
    member = tl.sum(is_before.to(tl.int32), axis=0)
    place = pid - tl.sum(tl.where(is_before, programs, 0), axis=0)
    is_it = index == member
    first_tile = tl.sum(tl.where(is_it, first, 0), axis=0)
    num_tiles = tl.sum(tl.where(is_it, after - first, 0), axis=0)
    return member, first_tile, num_tiles, place


@triton.jit(do_not_specialize=["num_members"])
def _decode_block_kernel(
    table_ptr,  # int64[num_members + 1, 2]       see above
    out_ptr,  # uint32[tiles in all * 1024]     pairs of BF16, whole tiles
    status_ptr,  # int32[tiles in all]             0, or a sum of STATUS_* bits
    num_members,  # int32
    TILES: tl.constexpr,
):
    """Decode TILES tiles of one member per program. Grid (at least the sum of ceil(tiles of a member / TILES),)."""
    member, first_tile, num_tiles, place = _member_of_program(table_ptr, num_members, TILES)
    if member < num_members:
        desc = tl.load(table_ptr + member * 2).to(tl.pointer_type(tl.int64))
        tile = (place * TILES + tl.arange(0, TILES))[:, None]
        tile = tl.minimum(tile, num_tiles - 1)
        _decode_tiles(
            desc, tile, num_tiles,
            out_ptr + first_tile * (TILE_WEIGHTS // 2), status_ptr + first_tile,
            TILES,
        )  # fmt: skip


def decode_block(
    table: torch.Tensor,
    num_tiles: int,
    out: torch.Tensor,
    status: torch.Tensor,
    tiles_per_program: int = 0,
) -> None:
    """Decode the matrices that `table` lists into `out`; allocates nothing and waits for nothing.

    Args:
        table: int64 [members + 1, 2] on the device, see above; at most MAX_MEMBERS members, none of them empty.
        num_tiles: tiles in all, as in the table's last row.
        out: BF16, flat, contiguous, at least `num_tiles * 2048` elements, aligned to 16 bytes.
        status: int32 [>= num_tiles]; 0 per tile, or a sum of STATUS_* bits.
        tiles_per_program: 0 for what configs.py says.
    """
    num_members = table.shape[0] - 1
    tiles = tiles_per_program or config_of(out.device).decode_tiles_per_program
    grid = (triton.cdiv(num_tiles, tiles) + num_members,)  # members end in the middle of a program
    _decode_block_kernel[grid](
        table, out.view(torch.uint32), status, num_members, tiles, num_warps=num_warps(tiles)
    )


COMPILE_SPECS = [
    CompileSpec(
        name="decode_block",
        fn=_decode_block_kernel,
        signature={
            "table_ptr": "*i64",
            "out_ptr": "*u32",
            "status_ptr": "*i32",
            "num_members": "i32",
            "TILES": "constexpr",
        },
        constexprs={"TILES": DEFAULT.decode_tiles_per_program},
        aligned_args=("table_ptr", "out_ptr", "status_ptr"),
        num_warps=num_warps(DEFAULT.decode_tiles_per_program),
        weights_per_program=DEFAULT.decode_tiles_per_program * layout.TILE_WEIGHTS,
        loop_runs=layout.STEPS // 2,
    )
]
