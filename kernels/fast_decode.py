"""Decode a whole matrix in the fast layout to row-major BF16, in one pass.

A program decodes a block of rows and columns within a row of tiles. Where its tiles have no escapes, there is no
barrier but that of the status words.
"""

import torch
import triton
import triton.language as tl

from vllm_dfloat.codec import descriptor, fast_layout
from vllm_dfloat.kernels.configs import config_of
from vllm_dfloat.kernels.fast_patches import _patch, _tile_status
from vllm_dfloat.kernels.fast_planes import (
    LOW_BYTES,
    TILE_COLS,
    TILE_ROWS,
    _decode_planes,
    _open,
    _store_nan,
    cols_factor,
)
from vllm_dfloat.kernels.tiles import STATUS_DESCRIPTOR


# Sizes are not specialized: a layer of another size must not compile another kernel while requests wait.
@triton.jit(do_not_specialize=["rows", "cols", "salt", "low_bytes"])
def _fast_decode_kernel(
    desc_ptr,  # int64[4]                 see codec/descriptor.py; num_entries and base as sizes
    out_ptr,  # uint16[rows, cols]        BF16 bits
    status_ptr,  # int32[num_tiles]          0, or a STATUS_* bit
    rows,  # int32
    cols,  # int32
    salt,  # int64                     of the seal
    low_bytes,  # int32                    0x00FF00FF, see `_four_weights`
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    TILES: tl.constexpr,
    AT_ONCE: tl.constexpr,
    COLS_FACTOR: tl.constexpr,
    WHOLE: tl.constexpr,
    PRMT: tl.constexpr,
):
    """Decode ROWS rows of TILES tiles of 128 columns.

    Equal bit for bit to `vllm_dfloat.codec.fast_reference.decode`. Grid (blocks,), those of a
    row one after another. Reads about 12 bits and writes 16 per weight.

    ROWS: divides TILE_ROWS. STEP: rows at a time, divides ROWS.
    AT_ONCE: weights of a thread at a time, 8 or 16; with 8 a warp stores whole lines, 16 take fewer instructions.
    COLS_FACTOR: 16 or 8 if it divides `cols`, else 1.
    WHOLE: whether ROWS divides `rows` and TILES * 128 divides `cols`; then COLS_FACTOR is 16.
    """
    tile_cols = (cols + TILE_COLS - 1) // TILE_COLS
    blocks = (tile_cols + TILES - 1) // TILES
    first_row = tl.program_id(0) // blocks * ROWS
    first_tile_col = tl.program_id(0) % blocks * TILES
    first_tile = (first_row // TILE_ROWS).to(tl.int64) * tile_cols + first_tile_col
    num_tiles = tl.minimum(TILES, tile_cols - first_tile_col)
    is_there = tl.arange(0, TILES) < num_tiles
    tile = first_tile + tl.arange(0, TILES)
    is_sound, low, high, starts, entries, base4, num_entries = _open(desc_ptr, salt, rows, cols)
    if is_sound:
        begin = tl.load(starts + first_tile).to(tl.int64)
        end = tl.load(starts + first_tile + num_tiles).to(tl.int64)
        tl.store(
            status_ptr + tile, _tile_status(starts, tile, is_there, num_entries), mask=is_there
        )
        _decode_planes(
            low, high, out_ptr, rows, cols, base4, low_bytes.to(tl.uint32), first_row, first_tile_col * TILE_COLS,
            ROWS, STEP, TILES * TILE_COLS, AT_ONCE, COLS_FACTOR, WHOLE, PRMT,
        )  # fmt: skip
        if begin != end:
            _patch(
                starts, entries, out_ptr, first_tile, first_tile_col, first_row, rows, cols, begin, end, num_entries,
                ROWS, TILES,
            )  # fmt: skip
    else:
        _store_nan(
            out_ptr, rows, cols, first_row, first_tile_col * TILE_COLS, ROWS, TILES * TILE_COLS
        )
        tl.store(status_ptr + tile, tl.full([TILES], STATUS_DESCRIPTOR, tl.int32), mask=is_there)


def decode(
    desc: torch.Tensor,
    rows: int,
    cols: int,
    out: torch.Tensor,
    status: torch.Tensor,
    *,
    prmt: bool | None = None,
) -> None:
    """Decode the matrix [rows, cols] that `desc` describes; allocates nothing and does not wait for the device.

    Args:
        desc: int64 [4] on the device, made by this process; the payload is read only if its seal is right.
        rows, cols: shape of the matrix.
        out: BF16, flat, contiguous, at least `rows * cols` elements, aligned to 16 bytes.
        status: int32, at least the tiles of the layout; 0 per tile, or a STATUS_* bit.
        prmt: join bytes with PRMT; None: unless Triton interprets. The bits are the same.
    """
    if rows * cols:
        config = config_of(out.device)
        height, tiles = config.fast_rows_per_program, config.fast_tiles_per_program
        whole = rows % height == 0 and cols % (tiles * fast_layout.TILE_COLS) == 0
        blocks = triton.cdiv(cols, tiles * fast_layout.TILE_COLS)
        salt = descriptor.salt(desc.data_ptr(), fast_layout.size(rows, cols))
        _fast_decode_kernel[(triton.cdiv(rows, height) * blocks,)](
            desc, out.view(torch.uint16), status, rows, cols, salt, LOW_BYTES, height, config.fast_rows_at_once, tiles,
            config.fast_weights_at_once, cols_factor(cols), whole, has_prmt() if prmt is None else prmt,
            num_warps=config.fast_num_warps,
        )  # fmt: skip


def has_prmt() -> bool:
    """Return whether kernels are compiled, and not interpreted."""
    return isinstance(_fast_decode_kernel, triton.runtime.JITFunction)
