"""Decode chosen rows of a matrix in the fast layout, for embedding look-ups."""

import torch
import triton
import triton.language as tl

from vllm_dfloat.codec import descriptor, fast_layout
from vllm_dfloat.kernels.configs import FAST_ROWS_NUM_WARPS, FAST_ROWS_TILES_PER_PROGRAM
from vllm_dfloat.kernels.fast_decode import has_prmt
from vllm_dfloat.kernels.fast_patches import _patch
from vllm_dfloat.kernels.fast_planes import (
    GROUP,
    HALF,
    LOW_BYTES,
    TILE_COLS,
    TILE_ROWS,
    _decode_planes,
    _open,
    _store_nan,
    cols_factor,
)


@triton.jit(do_not_specialize=["rows", "cols", "salt", "low_bytes"])
def _fast_rows_kernel(
    desc_ptr,  # int64[4]                 see codec/descriptor.py; num_entries and base as sizes
    ids_ptr,  # int64[num_ids]            the chosen rows
    out_ptr,  # uint16[num_ids, cols]     BF16 bits
    rows,  # int32
    cols,  # int32
    salt,  # int64                     of the seal
    low_bytes,  # int32                    0x00FF00FF, see `_four_weights`
    TILES: tl.constexpr,
    COLS_FACTOR: tl.constexpr,
    PRMT: tl.constexpr,
):
    """Decode one chosen row in TILES tiles of 128 columns.

    Equal bit for bit to those rows of `vllm_dfloat.codec.fast_reference.decode`. Grid (num_ids * parts of a row,).
    An id outside the matrix reads the nearest row: vLLM masks such ids out afterwards.

    COLS_FACTOR: 16 or 8 if it divides `cols`, else 1.
    """
    tile_cols = (cols + TILE_COLS - 1) // TILE_COLS
    parts = (tile_cols + TILES - 1) // TILES
    number = tl.program_id(0) // parts
    first_tile_col = tl.program_id(0) % parts * TILES
    row = tl.load(ids_ptr + number).to(tl.int64)
    row = tl.minimum(tl.maximum(row, 0), rows - 1).to(tl.int32)
    # Row `row` of the matrix lies where row `number` of the output does.
    if COLS_FACTOR >= HALF:
        out = out_ptr + (number - row).to(tl.int64) * (cols // HALF) * HALF
    else:
        out = out_ptr + (number - row).to(tl.int64) * cols
    is_sound, low, high, starts, entries, base4, num_entries = _open(desc_ptr, salt, rows, cols)
    if is_sound:
        first_tile = (row // TILE_ROWS).to(tl.int64) * tile_cols + first_tile_col
        num_tiles = tl.minimum(TILES, tile_cols - first_tile_col)
        begin = tl.load(starts + first_tile).to(tl.int64)
        end = tl.load(starts + first_tile + num_tiles).to(tl.int64)
        _decode_planes(
            low, high, out, row + 1, cols, base4, low_bytes.to(tl.uint32), row, first_tile_col * TILE_COLS,
            1, 1, TILES * TILE_COLS, GROUP, COLS_FACTOR, False, PRMT,
        )  # fmt: skip
        if begin != end:
            _patch(
                starts, entries, out, first_tile, first_tile_col, row, row + 1, cols, begin, end, num_entries, 1, TILES
            )  # fmt: skip
    else:
        _store_nan(out, row + 1, cols, row, first_tile_col * TILE_COLS, 1, TILES * TILE_COLS)


def decode_rows(
    desc: torch.Tensor,
    ids: torch.Tensor,
    rows: int,
    cols: int,
    out: torch.Tensor,
    *,
    prmt: bool | None = None,
) -> None:
    """Decode chosen rows of the matrix [rows, cols] that `desc` describes; allocates nothing, waits for nothing.

    Args:
        desc: int64 [4] on the device, made by this process; the payload is read only if its seal is right.
        ids: int64 or int32 [n], the rows.
        rows, cols: shape of the matrix.
        out: BF16 [n, cols], contiguous, aligned to 16 bytes.
        prmt: join bytes with PRMT; None: unless Triton interprets, or on an AMD GPU. The bits are the same.
    """
    if out.numel():
        tiles = FAST_ROWS_TILES_PER_PROGRAM
        salt = descriptor.salt(desc.data_ptr(), fast_layout.size(rows, cols))
        parts = triton.cdiv(cols, tiles * fast_layout.TILE_COLS)
        _fast_rows_kernel[(ids.numel() * parts,)](  # one axis: the others end at 65,535
            desc, ids, out.view(torch.uint16), rows, cols, salt, LOW_BYTES, tiles, cols_factor(cols),
            has_prmt() if prmt is None else prmt, num_warps=FAST_ROWS_NUM_WARPS,
        )  # fmt: skip
