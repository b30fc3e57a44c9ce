"""The numba code under decode.py: decodes tiles and checks where their codes end.

Four lanes of a tile are decoded side by side: one lane alone would wait for each table look-up.
"""

import numpy as np
from numba import njit

from vllm_dfloat.codec.layout import (
    LANE_LENGTH_UNIT,
    LANES,
    LENGTH_MASK,
    PAD_WORDS,
    SIGN_MANTISSA_MASK,
    STEP_WEIGHTS,
    STEPS,
    TILE_WEIGHTS,
)

STATUS_OK = 0
STATUS_LANE_END = 1  # a lane's codes do not end where its length says
STATUS_TILE_END = 2  # the lanes of a tile do not fill its words

WAYS = 4


@njit(nogil=True, cache=True)
def decode_tiles(  # type: ignore[no-untyped-def]
    first, last, lut, sign_mantissa, lane_lengths, tile_starts, words, code_bits, out, status
):
    for tile in range(first, last):
        base = tile * (TILE_WEIGHTS // 2)
        status[tile] = _decode_tile(
            tile, lut, sign_mantissa, lane_lengths, tile_starts, words, code_bits,
            out[base : base + TILE_WEIGHTS // 2],
        )  # fmt: skip


@njit(nogil=True, cache=True)
def decode_run(  # type: ignore[no-untyped-def]
    begin, end, first, lut, sign_mantissa, lane_lengths, tile_starts, words, code_bits, out, status
):
    for i in range(begin, end):
        base = i * (TILE_WEIGHTS // 2)
        status[i] = _decode_tile(
            first + i, lut, sign_mantissa, lane_lengths, tile_starts, words, code_bits,
            out[base : base + TILE_WEIGHTS // 2],
        )  # fmt: skip


@njit(nogil=True, cache=True)
def decode_chosen_tiles(  # type: ignore[no-untyped-def]
    first, last, tiles, lut, sign_mantissa, lane_lengths, tile_starts, words, code_bits, out, status
):
    for i in range(first, last):
        tile = tiles[i]
        base = tile * (TILE_WEIGHTS // 2)
        status[tile] = _decode_tile(
            tile, lut, sign_mantissa, lane_lengths, tile_starts, words, code_bits,
            out[base : base + TILE_WEIGHTS // 2],
        )  # fmt: skip


@njit(nogil=True, cache=True)
def decode_chosen_rows(  # type: ignore[no-untyped-def]
    rows, lut, sign_mantissa, lane_lengths, tile_starts, words, code_bits, cols, out, status
):
    scratch = np.empty(TILE_WEIGHTS // 2, np.uint32)
    weights = scratch.view(np.uint16)
    for i in range(rows.size):
        start = rows[i] * cols
        stop = start + cols
        for tile in range(start // TILE_WEIGHTS, (stop + TILE_WEIGHTS - 1) // TILE_WEIGHTS):
            status[i] |= _decode_tile(
                tile, lut, sign_mantissa, lane_lengths, tile_starts, words, code_bits, scratch
            )
            base = tile * TILE_WEIGHTS
            a, b = max(start, base), min(stop, base + TILE_WEIGHTS)
            out[i, a - start : b - start] = weights[a - base : b - base]


@njit(nogil=True, cache=True)
def _decode_tile(tile, lut, sign_mantissa, lane_lengths, tile_starts, words, code_bits, out):  # type: ignore[no-untyped-def]
    """Decode one tile to `out`, uint32 [1024]; return its status.

    Whatever the bytes say, no read leaves the words: a lane starts no later than the last word before the padding.
    """
    limit = np.int64(words.size - PAD_WORDS)
    begin = min(np.int64(tile_starts[tile]), limit)
    end = min(np.int64(tile_starts[tile + 1]), limit)
    positions = np.empty(WAYS, np.int64)
    ends = np.empty(WAYS, np.int64)
    bit = begin * 32
    status = 0
    for first_lane in range(0, LANES, WAYS):
        for k in range(WAYS):
            positions[k] = min(bit, limit * 32)
            bit += np.int64(lane_lengths[tile, first_lane + k]) * LANE_LENGTH_UNIT
            ends[k] = bit
        _decode_lanes(first_lane, lut, sign_mantissa[tile], words, code_bits, positions, out)
        for k in range(WAYS):
            if (positions[k] + LANE_LENGTH_UNIT - 1) // LANE_LENGTH_UNIT * LANE_LENGTH_UNIT != ends[
                k
            ]:
                status |= STATUS_LANE_END
    if (bit + 31) // 32 != end:
        status |= STATUS_TILE_END
    return status


@njit(nogil=True, cache=True)
def _decode_lanes(first_lane, lut, sign_mantissa, words, code_bits, positions, out):  # type: ignore[no-untyped-def]
    p0, p1, p2, p3 = positions[0], positions[1], positions[2], positions[3]
    shift = np.uint32(32 - code_bits)
    pairs = np.empty((WAYS, STEP_WEIGHTS // 2), np.uint32)
    for step in range(STEPS):
        for pair in range(STEP_WEIGHTS // 2):
            w0, w1, w2, w3 = (
                _window(words, p0),
                _window(words, p1),
                _window(words, p2),
                _window(words, p3),
            )
            e0, e1, e2, e3 = lut[w0 >> shift], lut[w1 >> shift], lut[w2 >> shift], lut[w3 >> shift]
            w0 = np.uint32(w0 << np.uint32(e0 & LENGTH_MASK))
            w1 = np.uint32(w1 << np.uint32(e1 & LENGTH_MASK))
            w2 = np.uint32(w2 << np.uint32(e2 & LENGTH_MASK))
            w3 = np.uint32(w3 << np.uint32(e3 & LENGTH_MASK))
            f0, f1, f2, f3 = lut[w0 >> shift], lut[w1 >> shift], lut[w2 >> shift], lut[w3 >> shift]
            p0 += (e0 & LENGTH_MASK) + (f0 & LENGTH_MASK)
            p1 += (e1 & LENGTH_MASK) + (f1 & LENGTH_MASK)
            p2 += (e2 & LENGTH_MASK) + (f2 & LENGTH_MASK)
            p3 += (e3 & LENGTH_MASK) + (f3 & LENGTH_MASK)
            pairs[0, pair] = np.uint32(e0) | np.uint32(f0) << np.uint32(16)
            pairs[1, pair] = np.uint32(e1) | np.uint32(f1) << np.uint32(16)
            pairs[2, pair] = np.uint32(e2) | np.uint32(f2) << np.uint32(16)
            pairs[3, pair] = np.uint32(e3) | np.uint32(f3) << np.uint32(16)
        for k in range(WAYS):
            lane = first_lane + k
            _merge(
                sign_mantissa[step // 2, lane],
                step % 2 * 2,
                pairs[k],
                out,
                (step * LANES + lane) * 4,
            )
    positions[0], positions[1], positions[2], positions[3] = p0, p1, p2, p3


@njit(nogil=True, cache=True, inline="always")
def _window(words, position):  # type: ignore[no-untyped-def]
    """Return the 32 bits of the stream from bit `position` on."""
    word = position >> 5
    both = np.uint64(words[word]) << np.uint64(32) | np.uint64(words[word + 1])
    return np.uint32(both >> np.uint64(32 - (position & 31)))


@njit(nogil=True, cache=True, inline="always")
def _merge(sign_mantissa, first, pairs, out, base):  # type: ignore[no-untyped-def]
    """Write 8 weights: sign and mantissa from two words, exponents from four pairs of LUT entries."""
    mask = np.uint32(SIGN_MANTISSA_MASK)
    for k in range(2):
        word = sign_mantissa[first + k]
        out[base + 2 * k] = (word & mask) | (pairs[2 * k] & ~mask)
        word = word >> np.uint32(8) | word << np.uint32(24)
        out[base + 2 * k + 1] = (word & mask) | (pairs[2 * k + 1] & ~mask)
