"""Shared by the kernels of the fast layout: what the planes cannot hold is stored over what they gave.

These weights are rare: a program whose tiles have some waits until all that the planes gave is stored. For any bytes of
a payload, every loop has a constant bound, no read leaves the entries, and no write the block.
"""

import triton
import triton.language as tl

from vllm_dfloat.codec import fast_layout
from vllm_dfloat.kernels.fast_planes import TILE_COLS, TILE_ROWS
from vllm_dfloat.kernels.tiles import STATUS_TILE_END

RAW_ENTRIES = tl.constexpr(fast_layout.RAW_ENTRIES)
MAX_ESCAPES = tl.constexpr(fast_layout.MAX_ESCAPES)
AT_A_TIME = tl.constexpr(32)  # escapes of a tile


@triton.jit
def _tile_status(starts_ptr, tile, is_there, num_entries):
    """Return the status of tiles: STATUS_TILE_END where the starts cannot be those of escapes or of a raw tile."""
    begin = tl.load(starts_ptr + tile, mask=is_there, other=0).to(tl.int64)
    end = tl.load(starts_ptr + tile + 1, mask=is_there, other=0).to(tl.int64)
    count = end - begin
    is_right = ((count >= 0) & (count <= MAX_ESCAPES)) | (count == RAW_ENTRIES)
    return tl.where(is_right & (end <= num_entries), 0, STATUS_TILE_END)


@triton.jit
def _store_escapes(
    starts_ptr, entries_ptr, out_ptr, first_tile, first_tile_col, first_row, rows, cols, most, num_entries,
    ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Store the escapes of TILES tiles that lie in ROWS rows from `first_row` on, 32 of each tile at a time.

    most: int64, at least as many as any of these tiles has.
    """
    top = first_row // TILE_ROWS * TILE_ROWS
    bottom = tl.minimum(first_row + ROWS, rows)
    index = tl.arange(0, TILES * AT_A_TIME)
    tile = index // AT_A_TIME
    tile_cols = (cols + TILE_COLS - 1) // TILE_COLS
    is_there = first_tile_col + tile < tile_cols
    first = tl.load(starts_ptr + first_tile + tile, mask=is_there, other=0).to(tl.int64)
    last = tl.load(starts_ptr + first_tile + tile + 1, mask=is_there, other=0).to(tl.int64)
    first = tl.minimum(first, num_entries)
    count = tl.minimum(last, num_entries) - first
    count = tl.where(count == RAW_ENTRIES, 0, count)
    # A tile with more than MAX_ESCAPES is raw.
    for step in range(0, tl.minimum(most, MAX_ESCAPES).to(tl.int32), AT_A_TIME):
        number = step + index % AT_A_TIME
        is_one = number < count
        entry = tl.load(entries_ptr + first + number, mask=is_one, other=0)
        position = (entry >> 16).to(tl.int32)
        row = top + position // TILE_COLS
        col = (first_tile_col + tile) * TILE_COLS + position % TILE_COLS
        is_here = is_one & (row >= first_row) & (row < bottom) & (col < cols)
        tl.store(out_ptr + (row.to(tl.int64) * cols + col), entry.to(tl.uint16), mask=is_here)


@triton.jit
def _store_raw(entries, out_ptr, first_row, tile_col, rows, cols, ROWS: tl.constexpr):
    """Store ROWS rows of a raw tile from `first_row` on; entries: pointer to the first entry of the tile."""
    PAIRS: tl.constexpr = TILE_COLS // 2
    AT_ONCE: tl.constexpr = 4  # rows
    pair = tl.arange(0, AT_ONCE * PAIRS)
    for step in range(0, ROWS, AT_ONCE):
        row = first_row + step + pair // PAIRS
        col = tile_col * TILE_COLS + pair % PAIRS * 2
        both = tl.load(entries + (row % TILE_ROWS * PAIRS + pair % PAIRS))
        place = out_ptr + (row.to(tl.int64) * cols + col)
        tl.store(place, both.to(tl.uint16), mask=(row < rows) & (col < cols))
        tl.store(place + 1, (both >> 16).to(tl.uint16), mask=(row < rows) & (col + 1 < cols))


@triton.jit
def _patch(
    starts_ptr, entries_ptr, out_ptr, first_tile, first_tile_col, first_row, rows, cols, begin, end, num_entries,
    ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Store escapes and raw tiles over what the planes gave.

    begin, end: first entry of the first tile and after the last one.
    """
    tl.debug_barrier()  # they are stored by other threads than the weights that they replace
    # No tile has more entries than all together, unless the starts are damaged.
    most = tl.where(end < begin, RAW_ENTRIES, end - begin)
    _store_escapes(
        starts_ptr, entries_ptr, out_ptr, first_tile, first_tile_col, first_row, rows, cols, most, num_entries,
        ROWS, TILES,
    )  # fmt: skip
    if most >= RAW_ENTRIES:
        tile_cols = (cols + TILE_COLS - 1) // TILE_COLS
        for tile in range(0, tl.minimum(TILES, tile_cols - first_tile_col)):
            first = tl.load(starts_ptr + first_tile + tile).to(tl.int64)
            last = tl.load(starts_ptr + first_tile + tile + 1).to(tl.int64)
            if (last - first == RAW_ENTRIES) & (last <= num_entries):
                _store_raw(
                    entries_ptr + first, out_ptr, first_row, first_tile_col + tile, rows, cols, ROWS
                )
