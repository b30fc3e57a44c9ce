"""For the fused multiplication: the rows that a tile's weights belong to, and the partial sums.

A tile's 2048 weights continue from one row of the matrix into the next. The part of a tile that lies in one row is a
*segment*; a tile has one segment if the number of columns is a multiple of 2048, and at most `MAX_SEGMENTS`.
"""

import triton
import triton.language as tl

from vllm_dfloat.codec import layout

MAX_SEGMENTS = 4


def num_segments(cols: int) -> int:
    """Return the largest number of rows of a matrix with `cols` columns that one tile touches."""
    if cols % layout.TILE_WEIGHTS == 0:
        return 1
    return (layout.TILE_WEIGHTS - layout.STEP_WEIGHTS) // cols + 2


@triton.jit
def _wrap(column, cols, SEGMENTS: tl.constexpr):
    """Return a column counted from the start of a tile's first row as (column in its row, segment)."""
    segment = tl.zeros_like(column)
    for _ in tl.static_range(SEGMENTS - 1):
        beyond = column >= cols
        column -= tl.where(beyond, cols, 0)
        segment += beyond.to(tl.int32)
    return column, segment


@triton.jit
def _store_sums(
    part_ptr,
    tile,
    is_stored,
    sums,
    segment: tl.constexpr,
    ROWS: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Store sums [TILES, ROWS] of one segment of the tiles, int64 [TILES, 1], in float32[num_tiles, SEGMENTS, ROWS]."""
    row = tl.arange(0, ROWS)[None, :]
    tl.store(part_ptr + (tile * SEGMENTS + segment) * ROWS + row, sums, mask=is_stored)
