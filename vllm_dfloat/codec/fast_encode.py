"""Encode one BF16 matrix into the fast layout, on the CPU.

Three passes over the weights, each a numba kernel over a range of tiles: count the exponents, count the escapes, write.
The same bytes come out as from vllm_dfloat/device/fast_encode.py, whatever the number of threads.
"""

from dataclasses import replace

import numpy as np
from numba import njit

from vllm_dfloat.codec.arrays import I64Array, U16Array
from vllm_dfloat.codec.fast_layout import (
    CODES,
    HALF,
    MAX_ENTRIES,
    MAX_ESCAPES,
    RAW_ENTRIES,
    TILE_COLS,
    TILE_ROWS,
    FastLayout,
    FastTensor,
    half_base_of,
)
from vllm_dfloat.codec.threads import over_tiles
from vllm_dfloat.errors import UnsupportedError


def encode(weight: U16Array, name: str = "", *, must_be_small: bool = True) -> FastTensor | None:
    """Return `weight` in the fast layout; None where it would take 14 bits per weight or more.

    Args:
        weight: BF16 bits, uint16 [rows, cols], C-contiguous; any bit pattern.
        name: the tensor's name, for messages.
        must_be_small: if not, only a matrix without elements, or with too many entries for 32 bits, gives None.

    Raises:
        UnsupportedError: not a matrix of 16-bit words.
    """
    if weight.ndim != 2 or weight.dtype != np.uint16:
        raise UnsupportedError(
            f"{name or 'weight'}: {weight.dtype}{list(weight.shape)}; expected the bits of a BF16 "
            "matrix, uint16 [rows, cols]. Leave this tensor out of compression."
        )
    weight = np.ascontiguousarray(weight)
    rows, cols = weight.shape
    plan = FastLayout(rows, cols, 0, 0)
    if not plan.numel or (must_be_small and not plan.is_small):
        return None
    counts = sum(over_tiles(_count_exponents, plan.num_tiles, weight))
    half_base = half_base_of([int(count) for count in np.asarray(counts)])
    escapes = np.empty(plan.num_tiles, np.int64)
    over_tiles(_count_escapes, plan.num_tiles, weight, half_base, escapes)
    sizes = np.where(escapes > MAX_ESCAPES, RAW_ENTRIES, escapes)
    layout = replace(plan, base=2 * half_base, num_entries=int(sizes.sum()))
    if (must_be_small and not layout.is_small) or layout.num_entries >= MAX_ENTRIES:
        return None
    fast = FastTensor(layout, np.zeros(layout.num_bytes, np.uint8), name)
    fast.starts[1:] = np.cumsum(sizes)
    _write(weight, fast)
    return fast


def _write(weight: U16Array, fast: FastTensor) -> None:
    high = fast.high.reshape(fast.layout.rows, -1)
    starts: I64Array = fast.starts.astype(np.int64)
    over_tiles(
        _write_tiles, fast.layout.num_tiles, weight, fast.layout.base // 2, starts, fast.low.view(np.uint32), high,
        fast.entries,
    )  # fmt: skip


@njit(nogil=True, cache=True, inline="always")
def _bounds(tile, rows, cols):  # type: ignore[no-untyped-def]
    """Return first and last row, first and last column of a tile."""
    tile_cols = (cols + TILE_COLS - 1) // TILE_COLS
    row, col = tile // tile_cols * TILE_ROWS, tile % tile_cols * TILE_COLS
    return row, min(row + TILE_ROWS, rows), col, min(col + TILE_COLS, cols)


@njit(nogil=True, cache=True)
def _count_exponents(first, last, weight):  # type: ignore[no-untyped-def]
    # Four histograms: consecutive weights often share an exponent, and one counter would wait for itself.
    counts = np.zeros((4, 128), np.int64)
    for tile in range(first, last):
        top, bottom, left, right = _bounds(tile, weight.shape[0], weight.shape[1])
        for row in range(top, bottom):
            some = weight[row, left:right]
            for i in range(0, some.size // 4 * 4, 4):
                for k in range(4):
                    counts[k, (some[i + k] >> 8) & 0x7F] += 1
            for i in range(some.size // 4 * 4, some.size):
                counts[0, (some[i] >> 8) & 0x7F] += 1
    return counts.sum(axis=0)


@njit(nogil=True, cache=True, inline="always")
def _distance(weight, half_base):  # type: ignore[no-untyped-def]
    """Return the distance from the base modulo 128; CODES or more for an escape."""
    return (np.uint32(weight >> 8) - np.uint32(half_base)) & np.uint32(0x7F)


@njit(nogil=True, cache=True)
def _count_escapes(first, last, weight, half_base, escapes):  # type: ignore[no-untyped-def]
    for tile in range(first, last):
        top, bottom, left, right = _bounds(tile, weight.shape[0], weight.shape[1])
        found = np.int64(0)
        for row in range(top, bottom):
            some = weight[row, left:right]
            here = np.uint32(0)
            for i in range(some.size):
                here += np.uint32(_distance(some[i], half_base) >= np.uint32(CODES))
            found += np.int64(here)
        escapes[tile] = found


@njit(nogil=True, cache=True)
def _write_tiles(first, last, weight, half_base, starts, low, high, entries):  # type: ignore[no-untyped-def]
    """Write both planes of tiles, and their entries.

    low: uint32 [rows, pitch / 4]; high: uint32 [rows, pitch / 8].
    """
    eight = np.zeros(HALF, np.uint16)
    for tile in range(first, last):
        top, bottom, left, right = _bounds(tile, weight.shape[0], weight.shape[1])
        for row in range(top, bottom):
            some = weight[row, left:right]
            for i in range(0, some.size // HALF * HALF, HALF):
                _write_eight(some[i : i + HALF], half_base, low[row], high[row], (left + i) // HALF)
            rest = some.size % HALF
            if rest:  # the zeros behind the row stay zeros
                i = some.size - rest
                eight[:] = np.uint16(half_base << 8)
                eight[:rest] = some[i:]
                _write_eight(eight, half_base, low[row], high[row], (left + i) // HALF)
        if starts[tile + 1] - starts[tile] == RAW_ENTRIES:
            _write_raw(weight[top:bottom, left:right], entries[starts[tile] :])
        elif starts[tile + 1] > starts[tile]:
            _write_escapes(weight[top:bottom, left:right], half_base, entries[starts[tile] :])


@njit(nogil=True, cache=True, inline="always")
def _write_eight(some, half_base, low, high, index):  # type: ignore[no-untyped-def]
    """Write 8 weights: two words of low bytes and one of nibbles; of each four in the order 0, 2, 1, 3."""
    word0, word1 = np.uint32(0), np.uint32(0)
    nibbles0, nibbles1 = np.uint32(0), np.uint32(0)
    for k in range(4):
        shift = np.uint32(((k & 1) << 4) | ((k >> 1) << 3))
        a, b = np.uint32(some[k]), np.uint32(some[k + 4])
        word0 |= (a & np.uint32(0xFF)) << shift
        word1 |= (b & np.uint32(0xFF)) << shift
        # A difference of whole high bytes: only the lowest 3 bits and the sign are used.
        near0 = ((a >> np.uint32(8)) - np.uint32(half_base)) & np.uint32(CODES - 1)
        near1 = ((b >> np.uint32(8)) - np.uint32(half_base)) & np.uint32(CODES - 1)
        nibbles0 |= (((a >> np.uint32(8)) & np.uint32(0x80)) | near0) << shift
        nibbles1 |= (((b >> np.uint32(8)) & np.uint32(0x80)) | near1) << shift
    low[2 * index] = word0
    low[2 * index + 1] = word1
    high[index] = nibbles0 | (nibbles1 << np.uint32(4)) | (nibbles1 >> np.uint32(28))


@njit(nogil=True, cache=True)
def _write_escapes(tile, half_base, entries):  # type: ignore[no-untyped-def]
    found = 0
    for row in range(tile.shape[0]):
        for col in range(tile.shape[1]):
            if _distance(tile[row, col], half_base) >= np.uint32(CODES):
                entries[found] = (row * TILE_COLS + col) << 16 | tile[row, col]
                found += 1


@njit(nogil=True, cache=True)
def _write_raw(tile, entries):  # type: ignore[no-untyped-def]
    for row in range(tile.shape[0]):
        for col in range(tile.shape[1]):
            place = (row * TILE_COLS + col) // 2
            entries[place] |= np.uint32(tile[row, col]) << np.uint32(16 * (col % 2))
