"""Encode BF16 into the fast layout on the GPU: measure the tiles, write planes and entries.

Two passes over the weights, after one that counts exponents (encode_count.py); between them the host chooses the base
and adds up the entries. The same bytes as from vllm_dfloat.codec.fast_encode. A program has a tile, a thread 8
neighbouring weights of a row at a time.
"""

import torch
import triton
import triton.language as tl

from vllm_dfloat.codec import fast_layout
from vllm_dfloat.kernels.configs import config_of
from vllm_dfloat.kernels.fast_planes import HALF, TILE_COLS, TILE_ROWS, _four_words, _interleave

_RAW_ENTRIES = tl.constexpr(fast_layout.RAW_ENTRIES)
_MAX_ESCAPES = tl.constexpr(fast_layout.MAX_ESCAPES)
_GROUP = tl.constexpr(fast_layout.GROUP)
_EIGHTS = tl.constexpr(fast_layout.TILE_COLS // fast_layout.HALF)  # of a row of a tile
# Of two high bytes, each at the foot of 16 bits: the upper exponent bits, those of a distance of 8 or more, the bit to
# which one of these carries if they are added, the others.
_EXPONENTS = tl.constexpr(0x007F007F)
_FAR = tl.constexpr(0x00780078)
_FLAGS = tl.constexpr(0x00800080)
_CODES = tl.constexpr(0x00070007)
_SIGNS = tl.constexpr(0x00800080)
_LOW = tl.constexpr(0x00FF00FF)


@triton.jit
def _pair(weights_ptr, at, col, cols, is_here):
    """Load two neighbours of a row as one word, 0 for those past its end; return also the bits that are there."""
    has_first = is_here & (col < cols)
    has_second = is_here & (col + 1 < cols)
    first = tl.load(weights_ptr + at, mask=has_first, other=0).to(tl.uint32)
    second = tl.load(weights_ptr + (at + 1), mask=has_second, other=0).to(tl.uint32)
    there = tl.where(has_first, 0x0000FFFF, 0) | tl.where(has_second, 0xFFFF0000, 0)
    return first | (second << 16), there.to(tl.uint32)


@triton.jit
def _load(weights_ptr, row, col, rows, cols, COLS_FACTOR: tl.constexpr):
    """Load the 8 weights [N] from column `col` of `row` on; return 4 pairs, and which bits of each are there."""
    is_here = (row < rows) & (col < cols)
    if COLS_FACTOR >= HALF:
        at = row.to(tl.int64) * (cols // HALF) + col // HALF
        words = weights_ptr.to(tl.pointer_type(tl.uint32)) + at * 4
        a, b, c, d = _four_words(words, is_here[:, None], row.shape[0])
        a_there = tl.where(is_here, 0xFFFFFFFF, 0).to(tl.uint32)
        b_there = a_there
        c_there = a_there
        d_there = a_there
    else:
        at = row.to(tl.int64) * cols + col
        a, a_there = _pair(weights_ptr, at, col, cols, is_here)
        b, b_there = _pair(weights_ptr, at + 2, col + 2, cols, is_here)
        c, c_there = _pair(weights_ptr, at + 4, col + 4, cols, is_here)
        d, d_there = _pair(weights_ptr, at + 6, col + 6, cols, is_here)
    return a, b, c, d, a_there, b_there, c_there, d_there


@triton.jit
def _distances(pair, there, half_base):
    """Return the distances of two weights from the base, modulo 128, each at the foot of 16 bits; 0 if not there."""
    minus = (128 - half_base).to(tl.uint32) * 0x00010001
    return (((pair >> 8) & _EXPONENTS) + minus) & _EXPONENTS & there


@triton.jit
def _escapes(distances):
    """Return which of two weights are escapes: bits 7 and 23."""
    return ((distances & _FAR) + _FAR) & _FLAGS


@triton.jit
def _count(fa, fb, fc, fd):
    """Return how many of 8 weights are escapes, int32."""
    found = (fa + fb + fc + fd) >> 7
    return ((found & 0xF) + (found >> 16)).to(tl.int32)


@triton.jit
def _nibbles(pair, distances, there):
    """Return the signs and the codes of two weights, each in the lower byte of 16 bits."""
    return (((pair >> 8) & _SIGNS) & there) | (distances & _CODES)


@triton.jit
def _place(tile, tile_cols, first, N: tl.constexpr):
    """Return row and column of the first of each 8 weights: int32 [N], rows from `first` of the tile on."""
    index = tl.arange(0, N)
    row = (tile // tile_cols) * TILE_ROWS + first + index // _EIGHTS
    return row, (tile % tile_cols) * TILE_COLS + index % _EIGHTS * HALF


# Sizes are not specialized: a layer of another size must not compile another kernel while the model loads.
@triton.jit(do_not_specialize=["rows", "cols", "half_base"])
def _measure_kernel(
    weights_ptr,  # uint16[rows, cols]   BF16 bits, contiguous
    entries_ptr,  # int32[num_tiles]     entries of each tile
    rows,  # int32
    cols,  # int32
    half_base,  # int32
    STEP: tl.constexpr,
    COLS_FACTOR: tl.constexpr,
):
    """Count the entries of a tile: its escapes, or those of a raw tile. Grid (num_tiles,).

    STEP: rows at a time, divides 64. COLS_FACTOR: 8 if it divides `cols` (then `weights_ptr` is aligned to 16 bytes),
    else 1.
    """
    tile = tl.program_id(0)
    tile_cols = (cols + TILE_COLS - 1) // TILE_COLS
    found = tl.zeros([STEP * _EIGHTS], tl.int32)
    for first in range(0, TILE_ROWS, STEP):
        row, col = _place(tile, tile_cols, first, STEP * _EIGHTS)
        a, b, c, d, at, bt, ct, dt = _load(weights_ptr, row, col, rows, cols, COLS_FACTOR)
        fa = _escapes(_distances(a, at, half_base))
        fb = _escapes(_distances(b, bt, half_base))
        fc = _escapes(_distances(c, ct, half_base))
        fd = _escapes(_distances(d, dt, half_base))
        found += _count(fa, fb, fc, fd)
    escapes = tl.sum(found)
    tl.store(entries_ptr + tile, tl.where(escapes > _MAX_ESCAPES, _RAW_ENTRIES, escapes))


@triton.jit
def _list_escapes(entries_ptr, place, flags, words, in_tile):
    """Write the escapes of each 8 weights; flags: 4 pairs from `_escapes`; place: where the first goes, int64 [N]."""
    for k in tl.static_range(8):
        is_escape = ((flags[k // 2] >> (16 * (k % 2))) & 0x80) != 0
        bits = (words[k // 2] >> (16 * (k % 2))) & 0xFFFF
        tl.store(entries_ptr + place, ((in_tile + k).to(tl.uint32) << 16) | bits, mask=is_escape)
        place += is_escape.to(tl.int64)


@triton.jit(do_not_specialize=["rows", "cols", "half_base"])
def _write_kernel(
    weights_ptr,  # uint16[rows, cols]              BF16 bits, contiguous
    low_ptr,  # uint32[rows, pitch / 4]         low bytes
    high_ptr,  # uint32[rows, pitch / 8]         nibbles
    starts_ptr,  # uint32[num_tiles + 1]           first entry of each tile
    entries_ptr,  # uint32[num_entries]             zeros on entry
    rows,  # int32
    cols,  # int32
    half_base,  # int32
    STEP: tl.constexpr,
    COLS_FACTOR: tl.constexpr,
):
    """Write both planes and the entries of a tile. Grid (num_tiles,); see `_measure_kernel`.

    The planes are zeros on entry where a row has no weights.
    """
    tile = tl.program_id(0)
    tile_cols = (cols + TILE_COLS - 1) // TILE_COLS
    eights = (
        (cols + _GROUP - 1) // _GROUP * (_GROUP // HALF)
    )  # of a row, those that fill it up included
    begin = tl.load(starts_ptr + tile).to(tl.int64)
    num_entries = tl.load(starts_ptr + tile + 1).to(tl.int64) - begin
    in_tile = tl.arange(0, STEP * _EIGHTS)
    in_tile = in_tile // _EIGHTS * TILE_COLS + in_tile % _EIGHTS * HALF
    for first in range(0, TILE_ROWS, STEP):
        row, col = _place(tile, tile_cols, first, STEP * _EIGHTS)
        a, b, c, d, at, bt, ct, dt = _load(weights_ptr, row, col, rows, cols, COLS_FACTOR)
        is_here = (row < rows) & (col < cols)
        place = row.to(tl.int64) * eights + col // HALF
        low = tl.join((a & _LOW) | ((b & _LOW) << 8), (c & _LOW) | ((d & _LOW) << 8))
        two = tl.arange(0, 2)[None, :]
        da, db = _distances(a, at, half_base), _distances(b, bt, half_base)
        dc, dd = _distances(c, ct, half_base), _distances(d, dt, half_base)
        ahead = _nibbles(a, da, at) | (_nibbles(b, db, bt) << 8)
        behind = _nibbles(c, dc, ct) | (_nibbles(d, dd, dt) << 8)
        tl.store(low_ptr + (place * 2)[:, None] + two, low, mask=is_here[:, None])
        tl.store(high_ptr + place, ahead | (behind << 4) | (behind >> 28), mask=is_here)
        if num_entries == _RAW_ENTRIES:
            words = begin + (in_tile + first * TILE_COLS) // 2
            four = tl.arange(0, 4)[None, :]
            pairs = _interleave(a, b, c, d)
            tl.store(entries_ptr + words[:, None] + four, pairs, mask=is_here[:, None])
        elif num_entries != 0:
            flags = (_escapes(da), _escapes(db), _escapes(dc), _escapes(dd))
            here = _count(flags[0], flags[1], flags[2], flags[3])
            before = begin + (tl.cumsum(here, axis=0) - here)
            words = (a, b, c, d)
            _list_escapes(entries_ptr, before, flags, words, in_tile + first * TILE_COLS)
            begin += tl.sum(here).to(tl.int64)


def _cols_factor(cols: int) -> int:
    """Return COLS_FACTOR for rows of `cols` weights: 8 if it divides it, else 1."""
    return 8 if cols % 8 == 0 else 1


def measure(bits: torch.Tensor, half_base: int, entries: torch.Tensor) -> None:
    """Count the entries of each tile.

    Args:
        bits: BF16 (or other 16-bit words) [rows, cols], contiguous, aligned to 16 bytes; with elements.
        half_base: half of the base.
        entries: int32 [num_tiles], written.
    """
    rows, cols = bits.shape
    step = config_of(bits.device).fast_encode_rows
    _measure_kernel[(entries.numel(),)](
        bits.view(torch.uint16), entries, rows, cols, half_base, step, _cols_factor(cols)
    )


def write(
    bits: torch.Tensor,
    half_base: int,
    low: torch.Tensor,
    high: torch.Tensor,
    starts: torch.Tensor,
    entries: torch.Tensor,
) -> None:
    """Write both planes, escapes and raw tiles.

    Args:
        bits, half_base: as for `measure`.
        low: uint32 [rows * pitch / 4], zeros. high: uint32 [rows * pitch / 8], zeros.
        starts: uint32 [num_tiles + 1], first entry of each tile, the number of all entries last.
        entries: uint32 [num_entries], zeros.
    """
    rows, cols = bits.shape
    step = config_of(bits.device).fast_encode_rows
    _write_kernel[(starts.numel() - 1,)](
        bits.view(torch.uint16), low, high, starts, entries, rows, cols, half_base, step, _cols_factor(cols)
    )  # fmt: skip
