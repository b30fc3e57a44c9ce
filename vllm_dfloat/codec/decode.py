"""Decode the packed layout on the CPU: the numba twin of kernels/packed_decode.py.

Four lanes of a tile are decoded side by side: one lane alone would wait for each table look-up.
"""

import numpy as np
from numba import njit

from vllm_dfloat.codec.arrays import I32Array, I64Array, U16Array
from vllm_dfloat.codec.layout import (
    LANE_LENGTH_UNIT,
    LANES,
    LENGTH_MASK,
    PAD_WORDS,
    SIGN_MANTISSA_MASK,
    STEP_WEIGHTS,
    STEPS,
    TILE_WEIGHTS,
    PackedTensor,
)
from vllm_dfloat.codec.threads import over_tiles
from vllm_dfloat.errors import FormatError

STATUS_OK = 0
STATUS_LANE_END = 1  # a lane's codes do not end where its length says
STATUS_TILE_END = 2  # the lanes of a tile do not fill its words

WAYS = 4


def decode(packed: PackedTensor) -> U16Array:
    """Return the BF16 bits, uint16 [rows, cols], that `packed` was encoded from.

    Raises:
        FormatError: a tile's codes contradict its lane lengths.
    """
    lay = packed.layout
    out = np.empty(lay.padded_numel, np.uint16)
    status = np.empty(lay.num_tiles, np.int32)
    decode_into(packed, out, status)
    check_status(status, packed.name)
    return out[: lay.numel].reshape(lay.rows, lay.cols)


def decode_into(packed: PackedTensor, out: U16Array, status: I32Array) -> None:
    """Write all whole tiles of `packed` to `out` and a status word per tile to `status`.

    Args:
        packed: what `encode` made. Whatever its bytes say by now, no read leaves them.
        out: uint16 [>= layout.padded_numel].
        status: int32 [>= layout.num_tiles]; STATUS_OK or a sum of STATUS_* bits.
    """
    lay = packed.layout
    if packed.is_raw:
        out[: lay.padded_numel] = packed.payload.view(np.uint16)
        status[: lay.num_tiles] = STATUS_OK
        return
    over_tiles(
        _decode_tiles, lay.num_tiles, packed.lut, packed.sign_mantissa, packed.lane_lengths,
        packed.tile_starts, packed.words, lay.code_bits,
        out.view(np.uint32), status,
    )  # fmt: skip


def decode_run_into(
    packed: PackedTensor, first: int, count: int, out: U16Array, status: I32Array
) -> None:
    """Write tiles `first` to `first + count - 1` of `packed` to the beginning of `out`, their status words likewise.

    Args:
        packed: as for `decode_into`.
        out: uint16 [>= count * TILE_WEIGHTS].
        status: int32 [>= count].
    """
    lay, numel = packed.layout, count * TILE_WEIGHTS
    if packed.is_raw:
        out[:numel] = packed.payload.view(np.uint16)[first * TILE_WEIGHTS :][:numel]
        status[:count] = STATUS_OK
        return
    over_tiles(
        _decode_run, count, first, packed.lut, packed.sign_mantissa, packed.lane_lengths,
        packed.tile_starts, packed.words, lay.code_bits,
        out.view(np.uint32), status,
    )  # fmt: skip


def decode_tiles_into(
    packed: PackedTensor, tiles: I64Array, out: U16Array, status: I32Array
) -> None:
    """Write chosen tiles of `packed` to `out`, each in its place, and their status words; write nothing else.

    Args:
        packed, out, status: as for `decode_into`.
        tiles: int64 [n], numbers of tiles, each once.
    """
    lay = packed.layout
    if packed.is_raw:
        shape = lay.num_tiles, TILE_WEIGHTS
        source = packed.payload.view(np.uint16).reshape(shape)
        out[: lay.padded_numel].reshape(shape)[tiles] = source[tiles]
        status[tiles] = STATUS_OK
        return
    over_tiles(
        _decode_chosen_tiles, tiles.size, tiles, packed.lut, packed.sign_mantissa,
        packed.lane_lengths, packed.tile_starts, packed.words, lay.code_bits,
        out.view(np.uint32), status,
    )  # fmt: skip


def decode_rows(packed: PackedTensor, rows: I64Array) -> U16Array:
    """Return the chosen rows, uint16 [len(rows), cols]; only the tiles they touch are decoded.

    Raises:
        IndexError: a row outside the matrix.
        FormatError: a touched tile's codes contradict its lane lengths.
    """
    lay = packed.layout
    if rows.size and not (rows.min() >= 0 and rows.max() < lay.rows):
        raise IndexError(
            f"{packed.name or 'packed tensor'}: rows {rows.min()} to {rows.max()} asked for; "
            f"the matrix has {lay.rows}"
        )
    out = np.empty((rows.size, lay.cols), np.uint16)
    if packed.is_raw:
        out[:] = packed.payload.view(np.uint16)[: lay.numel].reshape(lay.rows, lay.cols)[rows]
        return out
    status = np.zeros(rows.size, np.int32)
    _decode_rows(
        rows, packed.lut, packed.sign_mantissa, packed.lane_lengths, packed.tile_starts,
        packed.words, lay.code_bits, lay.cols, out, status,
    )  # fmt: skip
    check_status(status, packed.name, "row")
    return out


def check_status(
    status: I32Array | I64Array,
    name: str,
    what: str = "tile",
    first: int = 0,
    advice: str = "The packed bytes were changed after encoding; load the model again.",
) -> None:
    """Raise FormatError if a decoder reported a contradiction.

    Args:
        status: a word per part that was decoded, 0 where all is well.
        name: what was decoded.
        what: what such a part is called.
        first: number of the first one.
        advice: what may have happened, and what to do.
    """
    wrong = np.flatnonzero(status)
    if wrong.size:
        raise FormatError(
            f"{name or 'packed tensor'}: {what} {first + wrong[0]} ended with status {status[wrong[0]]} "
            f"({wrong.size} of {status.size} did not end with 0). {advice}"
        )


@njit(nogil=True, cache=True)
def _decode_tiles(  # type: ignore[no-untyped-def]
    first, last, lut, sign_mantissa, lane_lengths, tile_starts, words, code_bits, out, status
):
    for tile in range(first, last):
        base = tile * (TILE_WEIGHTS // 2)
        status[tile] = _decode_tile(
            tile, lut, sign_mantissa, lane_lengths, tile_starts, words, code_bits,
            out[base : base + TILE_WEIGHTS // 2],
        )  # fmt: skip


@njit(nogil=True, cache=True)
def _decode_run(  # type: ignore[no-untyped-def]
    begin, end, first, lut, sign_mantissa, lane_lengths, tile_starts, words, code_bits, out, status
):
    for i in range(begin, end):
        base = i * (TILE_WEIGHTS // 2)
        status[i] = _decode_tile(
            first + i, lut, sign_mantissa, lane_lengths, tile_starts, words, code_bits,
            out[base : base + TILE_WEIGHTS // 2],
        )  # fmt: skip


@njit(nogil=True, cache=True)
def _decode_chosen_tiles(  # type: ignore[no-untyped-def]
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
def _decode_rows(  # type: ignore[no-untyped-def]
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
