"""Encode BF16 weights into the official DFloat11 format: the six tensors of a unit, with the official encoder's bytes.

Three passes over the weights, each a numba kernel over ranges of chunks: count the exponents, measure the chunks, write
the codes. The same bytes come out whatever the number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from numba import njit

from vllm_dfloat.checkpoint.code_tables import FIRST_POINTER, MAX_ROWS, build_tables
from vllm_dfloat.checkpoint.official_huffman import EOF, Codes, build_codes, build_luts
from vllm_dfloat.checkpoint.unit import BLOCK_WINDOWS, Unit, num_blocks
from vllm_dfloat.codec.encode import count_exponents
from vllm_dfloat.codec.layout import SYMBOL_SHIFT
from vllm_dfloat.codec.threads import over_tiles
from vllm_dfloat.errors import UnsupportedError

U8Array = npt.NDArray[np.uint8]
U16Array = npt.NDArray[np.uint16]
I64Array = npt.NDArray[np.int64]
Tensors = dict[str, npt.NDArray[np.generic]]

CHUNK = 2048  # weights that a thread takes at once
MAX_WEIGHTS = (1 << 32) - 1
MAX_STREAM_BYTES = (1 << 31) - 1


def encode_unit(weights: Sequence[U16Array], name: str) -> Tensors:
    """Return the six tensors, as a file holds them, of a unit with these members.

    Args:
        weights: BF16 bits of each member, uint16 of any shape, in the order of the unit.
        name: module path of the unit, for messages.

    Returns:
        encoded_exponent, sign_mantissa, luts, output_positions, gaps and split_positions.

    Raises:
        UnsupportedError: the format cannot hold these weights.
    """
    flat = _flatten(weights, name)
    counts = count_exponents(flat)
    _check_exponents(counts, name)
    codes = build_codes(counts)
    luts = build_luts(codes)
    if len(luts) > MAX_ROWS:
        raise UnsupportedError(
            f"{name}: {len(luts) - 2} child tables for {np.count_nonzero(counts)} exponents; the format can name "
            f"{MAX_ROWS - 2}. Leave this weight in BF16."
        )
    starts = _chunk_starts(flat, luts[-1])
    num_bytes = -(-int(starts[-1]) // 8)
    if num_bytes > MAX_STREAM_BYTES:
        raise UnsupportedError(
            f"{name}: {num_bytes} bytes of codes; the format can hold {MAX_STREAM_BYTES}. Split the unit."
        )
    stream, sign_mantissa, gaps, positions = _write(flat, starts, codes)
    splits = np.cumsum([weight.size for weight in weights])[:-1]
    return {
        "encoded_exponent": stream,
        "sign_mantissa": sign_mantissa,
        "luts": luts,
        "output_positions": positions.astype("<u4").view(np.uint8),
        "gaps": gaps,
        "split_positions": splits.astype(np.int64),
    }


def as_unit(tensors: Mapping[str, npt.NDArray[np.generic]], name: str) -> Unit:
    """Return the unit whose tensors `encode_unit` returned, ready to be decoded."""
    stream = tensors["encoded_exponent"].view(np.uint8)
    sign_mantissa = tensors["sign_mantissa"].view(np.uint8)
    luts = tensors["luts"].view(np.uint8)
    positions = tensors["output_positions"].view("<u4").astype(np.int64)
    if len(positions) == num_blocks(stream.size):  # one entry short (see `_trim`)
        positions = np.append(positions, sign_mantissa.size)
    splits = np.concatenate(([0], tensors["split_positions"], [sign_mantissa.size]))
    return Unit(
        name=name,
        where=name,
        stream=stream,
        sign_mantissa=sign_mantissa,
        gaps=tensors["gaps"].view(np.uint8),
        positions=positions,
        splits=splits.astype(np.int64),
        luts=luts,
        tables=build_tables(luts, f"{name}.luts"),
    )


def _flatten(weights: Sequence[U16Array], name: str) -> U16Array:
    for weight in weights:
        if weight.dtype != np.uint16 or not weight.size:
            raise UnsupportedError(
                f"{name}: {weight.dtype}{list(weight.shape)}; expected the bits of BF16 weights, uint16, at least "
                "one. Leave this weight out of compression."
            )
    numel = sum(weight.size for weight in weights)
    if not 0 < numel <= MAX_WEIGHTS:
        raise UnsupportedError(
            f"{name}: {numel} weights; the format holds 1 to {MAX_WEIGHTS} in a unit. Split it, or leave it out."
        )
    flat = [np.ascontiguousarray(weight).reshape(-1) for weight in weights]
    return flat[0] if len(flat) == 1 else np.concatenate(flat)


def _check_exponents(counts: I64Array, name: str) -> None:
    wrong = np.flatnonzero(counts[FIRST_POINTER:])
    if wrong.size:
        exponent = FIRST_POINTER + int(wrong[0])
        raise UnsupportedError(
            f"{name}: {counts[exponent]} weights have exponent {exponent}; the format holds exponents below "
            f"{FIRST_POINTER} (no value of 2**113 or more, no Inf, no NaN). Leave this weight in BF16."
        )


def _chunk_starts(flat: U16Array, lengths: U8Array) -> I64Array:
    """Return the bit at which the codes of each chunk start, and behind them that at which the last code ends."""
    starts = np.zeros(-(-flat.size // CHUNK) + 1, np.int64)
    over_tiles(_measure_chunks, starts.size - 1, flat, lengths, starts[1:])
    return np.cumsum(starts)


def _write(
    flat: U16Array, starts: I64Array, codes: Codes
) -> tuple[U8Array, U8Array, U8Array, I64Array]:
    """Return encoded_exponent, sign_mantissa, gaps and output_positions (the latter as int64)."""
    num_bits = int(starts[-1])
    num_bytes = -(-num_bits // 8)
    blocks = num_blocks(num_bytes)
    lengths, values = np.zeros(256, np.uint8), np.zeros(256, np.uint32)
    for symbol, (value, length) in codes.items():
        if symbol != EOF:
            lengths[symbol], values[symbol] = length, value
    # One window more than there are: the last code may end where a new one would begin.
    words = np.zeros(BLOCK_WINDOWS * blocks + 1, np.uint64)
    first_bits = np.zeros(words.size, np.uint8)
    positions = np.zeros(blocks + 1, np.int64)
    sign_mantissa = np.empty(flat.size, np.uint8)
    tails = over_tiles(
        _write_chunks, starts.size - 1, flat, starts, lengths, values,
        words, first_bits, positions, sign_mantissa,
    )  # fmt: skip
    for window, tail in tails:
        words[window] |= np.uint64(tail)
    if num_bits % 8:
        words[num_bits >> 6] |= np.uint64(_end_marker(num_bits, codes[EOF]))
    elif first_bits[num_bits >> 6] == num_bits & 63:
        first_bits[num_bits >> 6] = 0  # no code starts in that window, not even EOF
    gaps = np.empty(320 * blocks, np.uint8)
    over_tiles(_pack_gaps, gaps.size // 5, first_bits, gaps)
    stream = words.astype(">u8").view(np.uint8)[:num_bytes].copy()
    return stream, sign_mantissa, gaps, _trim(positions, flat.size, num_bits)


def _end_marker(num_bits: int, eof: tuple[int, int]) -> int:
    """Return the leading bits of EOF that fill up the last byte, at their place in their window."""
    code, length = eof
    hole = -num_bits % 8
    fill = code >> (length - hole) if length >= hole else code << (hole - length)
    return fill << (64 - num_bits % 64 - hole)


def _trim(positions: I64Array, numel: int, num_bits: int) -> I64Array:
    """Close the positions with the number of weights; a block in which nothing starts, not even EOF, has no entry."""
    positions[-1] = numel
    nothing_starts = num_bits % 8 == 0 and positions[-2] == numel
    return positions[:-1] if nothing_starts else positions


@njit(nogil=True, cache=True)
def _measure_chunks(first, last, flat, lengths, bits):  # type: ignore[no-untyped-def]
    for chunk in range(first, last):
        total = 0
        for i in range(chunk * CHUNK, min((chunk + 1) * CHUNK, flat.size)):
            total += lengths[(flat[i] >> SYMBOL_SHIFT) & 0xFF]
        bits[chunk] = total


@njit(nogil=True, cache=True)
def _write_chunks(  # type: ignore[no-untyped-def]
    first, last, flat, starts, lengths, values, words, first_bits, positions, sign_mantissa
):
    """Write the codes of chunks window by window, most significant bit first, and what tells where windows begin.

    Returns the window in which the last code ends and its bits so far: the next range goes on there, perhaps at the
    same time, and writes that window's word with zeros in their place.
    """
    begin, end = first * CHUNK, min(last * CHUNK, flat.size)
    window = starts[first] >> 6
    used = starts[first] & 63
    pending = np.uint64(0)
    for i in range(begin, end):
        symbol = (flat[i] >> SYMBOL_SHIFT) & 0xFF
        length = np.int64(lengths[symbol])
        value = np.uint64(values[symbol])
        used += length
        if used < 64:
            pending = pending << np.uint64(length) | value
            continue
        used -= 64  # bits of this code in the next window
        words[window] = pending << np.uint64(length - used) | value >> np.uint64(used)
        pending = value  # its upper bits are shifted out before they count
        window += 1
        first_bits[window] = used
        if window % BLOCK_WINDOWS == 0:
            positions[window // BLOCK_WINDOWS] = i + 1
    for i in range(begin, end):
        sign_mantissa[i] = (flat[i] >> 8 & 0x80) | (flat[i] & 0x7F)
    tail = pending << np.uint64(64 - used) if used else np.uint64(0)
    return window, tail


@njit(nogil=True, cache=True)
def _pack_gaps(first, last, first_bits, gaps):  # type: ignore[no-untyped-def]
    """Pack the gaps of 8 windows at a time, 5 bits each, into 5 bytes."""
    for group in range(first, last):
        bits = np.uint64(0)
        for k in range(8):
            bits = bits << np.uint64(5) | np.uint64(first_bits[8 * group + k])
        for k in range(5):
            gaps[5 * group + k] = np.uint8(bits >> np.uint64(32 - 8 * k))
