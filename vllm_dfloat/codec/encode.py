"""Encode one BF16 matrix into the packed layout, on the CPU.

Three passes over the weights, each a numba kernel over a range of tiles: count the exponents, measure the lanes, write
the codes. The same bits come out for the same weights, whatever the number of threads.
"""

from dataclasses import replace

import numpy as np
from numba import njit

from vllm_dfloat.codec.arrays import I64Array, U8Array, U16Array, U32Array
from vllm_dfloat.codec.huffman import NUM_SYMBOLS, build_lut, canonical_codes, choose_code
from vllm_dfloat.codec.layout import (
    LANE_LENGTH_UNIT,
    LANES,
    MAX_WORDS,
    PAD_WORDS,
    SIGN_MANTISSA_MASK,
    STEP_WEIGHTS,
    STEPS,
    SYMBOL_SHIFT,
    TILE_WEIGHTS,
    PackedLayout,
    PackedTensor,
)
from vllm_dfloat.codec.threads import over_tiles
from vllm_dfloat.errors import UnsupportedError


def encode(weight: U16Array, name: str = "") -> PackedTensor:
    """Return `weight` in the packed layout, or raw where coding would not make it smaller.

    Args:
        weight: BF16 bits, uint16 [rows, cols], C-contiguous; any bit pattern.
        name: the tensor's name, for messages.

    Raises:
        UnsupportedError: not a matrix of 16-bit words, or one with over 2**31 words of code.
    """
    if weight.ndim != 2 or weight.dtype != np.uint16:
        raise UnsupportedError(
            f"{name or 'weight'}: {weight.dtype}{list(weight.shape)}; expected the bits of a BF16 "
            "matrix, uint16 [rows, cols]. Leave this tensor out of compression."
        )
    rows, cols = weight.shape
    flat = np.ascontiguousarray(weight).reshape(-1)
    code_bits, lengths = choose_code(count_exponents(flat))
    raw = PackedLayout(rows, cols, 0, code_bits)
    tiles = _tiles(flat, lengths)
    lane_lengths, starts = _measure(tiles, raw.num_tiles, lengths)
    layout = layout_for(raw, int(starts[-1]), name)
    if layout.is_raw:
        return _raw(flat, raw, name)
    packed = PackedTensor(layout, np.zeros(layout.num_bytes, np.uint8), name)
    packed.lut[:] = build_lut(lengths, code_bits)
    packed.lane_lengths[:] = lane_lengths
    packed.tile_starts[:] = starts
    _write(packed, tiles, lengths)
    return packed


def count_exponents(flat: U16Array) -> I64Array:
    """Return how often each exponent occurs in `flat`, BF16 bits: int64 [256]."""
    body = flat[: flat.size // TILE_WEIGHTS * TILE_WEIGHTS]
    partial = over_tiles(_count_tiles, body.size // TILE_WEIGHTS, body)
    rest = np.bincount(flat[body.size :] >> SYMBOL_SHIFT & 0xFF, minlength=NUM_SYMBOLS)
    return np.asarray(sum(partial) + rest, np.int64)


def layout_for(raw: PackedLayout, num_code_words: int, name: str) -> PackedLayout:
    """Return the layout of a matrix whose codes need `num_code_words` words; `raw` where that would not be smaller.

    Raises:
        UnsupportedError: over 2**31 words of code.
    """
    num_words = num_code_words + PAD_WORDS
    if num_words >= MAX_WORDS:
        raise UnsupportedError(
            f"{name or 'weight'}: {num_words} words of code; the layout addresses fewer than "
            f"{MAX_WORDS}. Split the tensor or leave it out of compression."
        )
    coded = replace(raw, num_words=num_words)
    return coded if coded.num_bytes < 2 * coded.numel else raw


def filler(lengths: U8Array) -> int:
    """Return the BF16 bits that fill up the last tile: a weight of the shortest code."""
    return int(np.where(lengths > 0, lengths, 255).argmin()) << SYMBOL_SHIFT


def _raw(flat: U16Array, layout: PackedLayout, name: str) -> PackedTensor:
    payload = np.zeros(layout.num_bytes, np.uint8)
    payload.view(np.uint16)[: flat.size] = flat
    return PackedTensor(layout, payload, name)


def _tiles(flat: U16Array, lengths: U8Array) -> tuple[U16Array, U16Array]:
    """Return the whole tiles, and the last one filled up with the weight of the shortest code (or nothing)."""
    body = flat[: flat.size // TILE_WEIGHTS * TILE_WEIGHTS]
    rest = flat[body.size :]
    if not rest.size:
        return body, rest
    tail = np.full(TILE_WEIGHTS, filler(lengths), np.uint16)
    tail[: rest.size] = rest
    return body, tail


def _measure(
    tiles: tuple[U16Array, U16Array], num_tiles: int, lengths: U8Array
) -> tuple[U8Array, U32Array]:
    """Return the lane lengths of all tiles, and where each tile starts among the words."""
    body, tail = tiles
    full = body.size // TILE_WEIGHTS
    lane_lengths = np.empty((num_tiles, LANES), np.uint8)
    over_tiles(_measure_tiles, full, body, lengths, lane_lengths)
    _measure_tiles(0, num_tiles - full, tail, lengths, lane_lengths[full:])
    lane_bits = lane_lengths.sum(axis=1, dtype=np.int64) * LANE_LENGTH_UNIT
    starts = np.zeros(num_tiles + 1, np.uint32)
    np.cumsum(-(-lane_bits // 32), out=starts[1:], dtype=np.uint32)
    return lane_lengths, starts


def _write(packed: PackedTensor, tiles: tuple[U16Array, U16Array], lengths: U8Array) -> None:
    """Write the words of all tiles from their starts on, and their signs and mantissas."""
    body, tail = tiles
    full = body.size // TILE_WEIGHTS
    codes, starts = canonical_codes(lengths), packed.tile_starts
    given = lengths, codes, starts, packed.words, packed.sign_mantissa
    over_tiles(_write_tiles, full, 0, body, *given)
    _write_tiles(0, packed.layout.num_tiles - full, full, tail, *given)


@njit(nogil=True, cache=True)
def _count_tiles(first, last, flat):  # type: ignore[no-untyped-def]
    # Four histograms: consecutive weights often share an exponent, and one counter would wait for itself.
    counts = np.zeros((4, NUM_SYMBOLS), np.int64)
    for i in range(first * TILE_WEIGHTS, last * TILE_WEIGHTS, 4):
        for k in range(4):
            counts[k, (flat[i + k] >> SYMBOL_SHIFT) & 0xFF] += 1
    return counts.sum(axis=0)


@njit(nogil=True, cache=True)
def _measure_tiles(first, last, flat, lengths, lane_lengths):  # type: ignore[no-untyped-def]
    for tile in range(first, last):
        for lane in range(LANES):
            bits = 0
            for step in range(STEPS):
                base = tile * TILE_WEIGHTS + (step * LANES + lane) * STEP_WEIGHTS
                for j in range(STEP_WEIGHTS):
                    bits += lengths[(flat[base + j] >> SYMBOL_SHIFT) & 0xFF]
            lane_lengths[tile, lane] = (bits + LANE_LENGTH_UNIT - 1) // LANE_LENGTH_UNIT


@njit(nogil=True, cache=True)
def _write_tiles(first, last, offset, flat, lengths, codes, starts, words, sign_mantissa):  # type: ignore[no-untyped-def]
    """Write tiles first..last of `flat`, which are tiles offset + first.. of the matrix."""
    for tile in range(first, last):
        target = offset + tile
        word = np.int64(starts[target])
        pending = np.uint64(0)
        num_pending = np.int64(0)
        for lane in range(LANES):
            total = np.int64(0)
            for step in range(STEPS):
                base = tile * TILE_WEIGHTS + (step * LANES + lane) * STEP_WEIGHTS
                for j in range(STEP_WEIGHTS):
                    symbol = (flat[base + j] >> SYMBOL_SHIFT) & 0xFF
                    length = np.int64(lengths[symbol])
                    pending = (pending << np.uint64(length)) | np.uint64(codes[symbol])
                    num_pending += length
                    total += length
                    if num_pending >= 32:
                        num_pending -= 32
                        words[word] = np.uint32(pending >> np.uint64(num_pending))
                        word += 1
                _write_sign_mantissa(
                    flat, base, sign_mantissa[target, step // 2, lane], step % 2 * 2
                )
            padding = -total % LANE_LENGTH_UNIT
            pending <<= np.uint64(padding)
            num_pending += padding
            if num_pending >= 32:
                num_pending -= 32
                words[word] = np.uint32(pending >> np.uint64(num_pending))
                word += 1
        if num_pending:
            words[word] = np.uint32(pending << np.uint64(32 - num_pending))


@njit(nogil=True, cache=True, inline="always")
def _write_sign_mantissa(flat, base, target, first):  # type: ignore[no-untyped-def]
    """Write the sign and mantissa bits of 8 weights as two words, the second pair of each rotated left by 8."""
    mask = np.uint32(SIGN_MANTISSA_MASK)
    for k in range(2):
        i = base + 4 * k
        direct = (np.uint32(flat[i]) | np.uint32(flat[i + 1]) << np.uint32(16)) & mask
        turned = (np.uint32(flat[i + 2]) | np.uint32(flat[i + 3]) << np.uint32(16)) & mask
        turned = turned << np.uint32(8) | turned >> np.uint32(24)
        target[first + k] = direct | turned
