"""Decode a matrix in the fast layout to row-major BF16, or a run of its rows, in one pass.

A program decodes a block of rows and columns within a row of tiles. Where its tiles have no escapes, there is no
barrier but that of the status words.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from vllm_dfloat.codec import descriptor, fast_layout
from vllm_dfloat.kernels.configs import config_of
from vllm_dfloat.kernels.fast_patches import _patch, _tile_status
from vllm_dfloat.kernels.fast_planes import (
    HALF,
    LOW_BYTES,
    TILE_COLS,
    TILE_ROWS,
    _decode_planes,
    _open,
    _store_nan,
    cols_factor,
)
from vllm_dfloat.kernels.tiles import STATUS_DESCRIPTOR, is_compiled


@triton.jit
def _decode_block(
    desc_ptr, out_ptr, status_ptr, rows, cols, salt, low_bytes, first_row, first_tile_col, end,
    ROWS: tl.constexpr, STEP: tl.constexpr, TILES: tl.constexpr, AT_ONCE: tl.constexpr, COLS_FACTOR: tl.constexpr,
    WHOLE: tl.constexpr, PRMT: tl.constexpr,
):  # fmt: skip
    """Decode ROWS rows from `first_row` on and TILES tiles of 128 columns, and none from row `end` on.

    out_ptr, status_ptr: where row 0 and tile 0 of the matrix are; the other parameters are those of the kernels.
    """
    tile_cols = (cols + TILE_COLS - 1) // TILE_COLS
    first_tile = (first_row // TILE_ROWS).to(tl.int64) * tile_cols + first_tile_col
    num_tiles = tl.minimum(TILES, tile_cols - first_tile_col)
    is_there = tl.arange(0, TILES) < num_tiles
    tile = first_tile + tl.arange(0, TILES)
    is_sound, low, high, starts, entries, base4, num_entries = _open(desc_ptr, salt, rows, cols)
    if is_sound:
        begin = tl.load(starts + first_tile).to(tl.int64)
        after = tl.load(starts + first_tile + num_tiles).to(tl.int64)
        tl.store(
            status_ptr + tile, _tile_status(starts, tile, is_there, num_entries), mask=is_there
        )
        _decode_planes(
            low, high, out_ptr, end, cols, base4, low_bytes.to(tl.uint32), first_row, first_tile_col * TILE_COLS,
            ROWS, STEP, TILES * TILE_COLS, AT_ONCE, COLS_FACTOR, WHOLE, PRMT,
        )  # fmt: skip
        if begin != after:
            _patch(
                starts, entries, out_ptr, first_tile, first_tile_col, first_row, end, cols, begin, after, num_entries,
                ROWS, TILES,
            )  # fmt: skip
    else:
        _store_nan(
            out_ptr, end, cols, first_row, first_tile_col * TILE_COLS, ROWS, TILES * TILE_COLS
        )
        tl.store(status_ptr + tile, tl.full([TILES], STATUS_DESCRIPTOR, tl.int32), mask=is_there)


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
    blocks = (cols + TILES * TILE_COLS - 1) // (TILES * TILE_COLS)
    first_row = tl.program_id(0) // blocks * ROWS
    first_tile_col = tl.program_id(0) % blocks * TILES
    _decode_block(
        desc_ptr, out_ptr, status_ptr, rows, cols, salt, low_bytes, first_row, first_tile_col, rows,
        ROWS, STEP, TILES, AT_ONCE, COLS_FACTOR, WHOLE, PRMT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "cols", "first", "count", "salt", "low_bytes"])
def _fast_decode_run_kernel(
    desc_ptr,  # int64[4]                 see codec/descriptor.py; num_entries and base as sizes
    out_ptr,  # uint16[count, cols]       BF16 bits
    status_ptr,  # int32[tiles]              of the tiles of the run: 0, or a STATUS_* bit
    rows,  # int32                    of the matrix
    cols,  # int32
    first,  # int32                    the first row wanted, a multiple of 64
    count,  # int32                    how many
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
    """Decode rows first to first + count - 1 as `_fast_decode_kernel` does. WHOLE: whether ROWS divides `count` too."""
    blocks = (cols + TILES * TILE_COLS - 1) // (TILES * TILE_COLS)
    first_row = first + tl.program_id(0) // blocks * ROWS
    first_tile_col = tl.program_id(0) % blocks * TILES
    # Where row 0 and tile 0 of the matrix would be in the output.
    if COLS_FACTOR >= HALF:
        out_ptr -= first.to(tl.int64) * (cols // HALF) * HALF
    else:
        out_ptr -= first.to(tl.int64) * cols
    status_ptr -= (first // TILE_ROWS).to(tl.int64) * ((cols + TILE_COLS - 1) // TILE_COLS)
    _decode_block(
        desc_ptr, out_ptr, status_ptr, rows, cols, salt, low_bytes, first_row, first_tile_col, first + count,
        ROWS, STEP, TILES, AT_ONCE, COLS_FACTOR, WHOLE, PRMT,
    )  # fmt: skip


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
        prmt: join bytes with PRMT; None: unless Triton interprets, or on an AMD GPU. The bits are the same.
    """
    if rows * cols:
        constants = constants_of(rows, cols, out.device, prmt)
        salt = descriptor.salt(desc.data_ptr(), fast_layout.size(rows, cols))
        _fast_decode_kernel[(num_programs(rows, cols, constants),)](
            desc, out.view(torch.uint16), status, rows, cols, salt, LOW_BYTES, **constants
        )


def decode_run(
    desc: torch.Tensor,
    rows: int,
    cols: int,
    first: int,
    count: int,
    out: torch.Tensor,
    status: torch.Tensor,
    *,
    prmt: bool | None = None,
) -> None:
    """Decode `count` rows of the matrix [rows, cols] from row `first` on into the beginning of `out`.

    Args:
        rows, cols: shape of the whole matrix; first + count is at most `rows`.
        first: begins a tile, a multiple of 64.
        out: BF16, flat, contiguous, at least `count * cols` elements, aligned to 16 bytes.
        status: int32, at least the tiles of a matrix [count, cols].
        desc, prmt: as for `decode`, which waits and allocates as little.
    """
    if count * cols:
        constants = constants_of(count, cols, out.device, prmt)
        salt = descriptor.salt(desc.data_ptr(), fast_layout.size(rows, cols))
        _fast_decode_run_kernel[(num_programs(count, cols, constants),)](
            desc, out.view(torch.uint16), status, rows, cols, first, count, salt, LOW_BYTES, **constants
        )  # fmt: skip


def constants_of(
    count: int, cols: int, device: torch.device, prmt: bool | None = None
) -> dict[str, Any]:
    """Return the compile-time sizes, and warps, of a kernel that decodes `count` rows of `cols` columns."""
    config = config_of(device)
    height, width = (
        config.fast_rows_per_program,
        config.fast_tiles_per_program * fast_layout.TILE_COLS,
    )
    return dict(
        ROWS=height, STEP=config.fast_rows_at_once, TILES=config.fast_tiles_per_program,
        AT_ONCE=config.fast_weights_at_once, COLS_FACTOR=cols_factor(cols),
        WHOLE=count % height == 0 and cols % width == 0, PRMT=has_prmt() if prmt is None else prmt,
        num_warps=config.fast_num_warps,
    )  # fmt: skip


def num_programs(count: int, cols: int, constants: dict[str, Any]) -> int:
    """Return the programs that decode `count` rows of `cols` columns."""
    width = constants["TILES"] * fast_layout.TILE_COLS
    return int(triton.cdiv(count, constants["ROWS"]) * triton.cdiv(cols, width))


def has_prmt() -> bool:
    """Return whether kernels are compiled for an NVIDIA GPU, and not interpreted."""
    return torch.version.hip is None and is_compiled()
