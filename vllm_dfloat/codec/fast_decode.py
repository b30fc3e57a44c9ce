"""Decode the fast layout on the CPU: the numba twin of kernels/fast_decode.py."""

import numpy as np
from numba import njit

from vllm_dfloat.codec.arrays import I32Array, I64Array, U16Array
from vllm_dfloat.codec.decode import check_status
from vllm_dfloat.codec.decode_loops import STATUS_OK, STATUS_TILE_END
from vllm_dfloat.codec.fast_layout import (
    HALF,
    MAX_ESCAPES,
    RAW_ENTRIES,
    SIGN_CODE_MASK,
    TILE_COLS,
    TILE_ROWS,
    FastTensor,
)
from vllm_dfloat.codec.threads import over_tiles


def decode(fast: FastTensor) -> U16Array:
    """Return the BF16 bits, uint16 [rows, cols], that `fast` was encoded from.

    Raises:
        FormatError: the starts of the entries contradict each other.
    """
    lay = fast.layout
    out = np.empty((lay.rows, lay.cols), np.uint16)
    status = np.empty(lay.num_tiles, np.int32)
    decode_into(fast, out, status)
    check_status(status, fast.name)
    return out


def decode_into(fast: FastTensor, out: U16Array, status: I32Array, first: int = 0) -> None:
    """Write the matrix, or a run of its rows, to `out`, and a status word per tile of these to `status`.

    Args:
        fast: what `encode` made. Whatever its bytes say by now, no read or write leaves the arrays.
        out: uint16 [count, cols], for rows first to first + count - 1.
        status: int32 [>= tiles of those rows]; STATUS_OK, or STATUS_TILE_END where a tile's starts cannot be.
        first: begins a tile, a multiple of TILE_ROWS.
    """
    low, high, half_base, starts, entries = _arrays(fast)
    end, tile_cols = first + len(out), fast.layout.tile_cols
    starts = starts[first // TILE_ROWS * tile_cols :]
    tiles = -(-len(out) // TILE_ROWS) * tile_cols
    run = low[first:end], high[first:end], half_base, starts[: tiles + 1], entries
    over_tiles(_decode_tiles, tiles, *run, out, status)


def decode_rows(fast: FastTensor, rows: I64Array) -> U16Array:
    """Return the chosen rows, uint16 [len(rows), cols].

    Raises:
        IndexError: a row outside the matrix.
        FormatError: the starts of a touched tile contradict each other.
    """
    lay = fast.layout
    if rows.size and not (rows.min() >= 0 and rows.max() < lay.rows):
        raise IndexError(
            f"{fast.name or 'fast tensor'}: rows {rows.min()} to {rows.max()} asked for; "
            f"the matrix has {lay.rows}"
        )
    out = np.empty((rows.size, lay.cols), np.uint16)
    status = np.zeros(rows.size, np.int32)
    _decode_rows(rows, lay.tile_cols, *_arrays(fast), out, status)
    check_status(status, fast.name, "row")
    return out


def _arrays(fast: FastTensor):  # type: ignore[no-untyped-def]
    """Return what the kernels read: both planes as words, half of the base, starts and entries."""
    low = fast.low.view(np.uint32)
    high = fast.high.reshape(fast.layout.rows, -1)
    return low, high, fast.layout.base // 2, fast.starts, fast.entries


@njit(nogil=True, cache=True)
def _decode_tiles(first, last, low, high, half_base, starts, entries, out, status):  # type: ignore[no-untyped-def]
    rows, cols = out.shape
    tile_cols = (cols + TILE_COLS - 1) // TILE_COLS
    for tile in range(first, last):
        top, left = tile // tile_cols * TILE_ROWS, tile % tile_cols * TILE_COLS
        bottom, right = min(top + TILE_ROWS, rows), min(left + TILE_COLS, cols)
        for row in range(top, bottom):
            _decode_planes(low[row], high[row], half_base, left, right, out[row])
        begin, count, status[tile] = _entries_of(tile, starts, entries.size)
        if count:
            for row in range(top, bottom):
                _patch_row(row % TILE_ROWS, entries[begin : begin + count], out[row, left:right])


@njit(nogil=True, cache=True)
def _decode_rows(rows, tile_cols, low, high, half_base, starts, entries, out, status):  # type: ignore[no-untyped-def]
    cols = out.shape[1]
    for i in range(rows.size):
        row = rows[i]
        _decode_planes(low[row], high[row], half_base, 0, cols, out[i])
        for tile_col in range(tile_cols):
            tile = row // TILE_ROWS * tile_cols + tile_col
            begin, count, wrong = _entries_of(tile, starts, entries.size)
            status[i] |= wrong
            if count:
                left = tile_col * TILE_COLS
                part = out[i, left : min(left + TILE_COLS, cols)]
                _patch_row(row % TILE_ROWS, entries[begin : begin + count], part)


@njit(nogil=True, cache=True, inline="always")
def _decode_planes(low, high, half_base, left, right, out):  # type: ignore[no-untyped-def]
    """Decode columns left to right of a row; `left` is a multiple of 8."""
    base4 = np.uint32(half_base) * np.uint32(0x01010101)
    pairs = out[left : left + (right - left) // HALF * HALF].view(np.uint32)
    for i in range(pairs.size // 4):
        word = left // HALF + i
        _decode_eight(low[2 * word], low[2 * word + 1], high[word], base4, pairs, 4 * i)
    rest = (right - left) % HALF
    if rest:
        word = right // HALF
        last = np.empty(4, np.uint32)
        _decode_eight(low[2 * word], low[2 * word + 1], high[word], base4, last, 0)
        out[right - rest : right] = last.view(np.uint16)[:rest]


@njit(nogil=True, cache=True, inline="always")
def _decode_eight(low0, low1, nibbles, base4, pairs, at):  # type: ignore[no-untyped-def]
    """Write 8 weights as 4 pairs; the steps are those of kernels/fast_planes.py."""
    mask = np.uint32(0x01010101 * SIGN_CODE_MASK)
    even, odd = np.uint32(0x00FF00FF), np.uint32(0xFF00FF00)
    high0 = (nibbles & mask) + base4
    turned = nibbles >> np.uint32(4) | nibbles << np.uint32(28)
    high1 = (turned & mask) + base4
    pairs[at] = (low0 & even) | (high0 << np.uint32(8) & odd)
    pairs[at + 1] = (low0 >> np.uint32(8) & even) | (high0 & odd)
    pairs[at + 2] = (low1 & even) | (high1 << np.uint32(8) & odd)
    pairs[at + 3] = (low1 >> np.uint32(8) & even) | (high1 & odd)


@njit(nogil=True, cache=True)
def _entries_of(tile, starts, num_entries):  # type: ignore[no-untyped-def]
    """Return a tile's first entry, how many there are, and its status."""
    begin, end = np.int64(starts[tile]), np.int64(starts[tile + 1])
    count = end - begin
    if not (0 <= count <= MAX_ESCAPES or count == RAW_ENTRIES) or end > num_entries:
        return 0, 0, STATUS_TILE_END
    return begin, count, STATUS_OK


@njit(nogil=True, cache=True)
def _patch_row(row, entries, out):  # type: ignore[no-untyped-def]
    """Put the weights of row `row` of a tile that are among its entries in place."""
    if entries.size == RAW_ENTRIES:
        for col in range(out.size):
            both = entries[(row * TILE_COLS + col) // 2]
            out[col] = np.uint16(both >> np.uint32(16 * (col % 2)))
        return
    for entry in entries:
        position = np.int64(entry >> np.uint32(16))
        if position // TILE_COLS == row and position % TILE_COLS < out.size:
            out[position % TILE_COLS] = np.uint16(entry & np.uint32(0xFFFF))
