"""The work on each piece of a unit while it is encoded, on the CPU: numba kernels over ranges of chunks.

The bytes do not depend on the number of threads. vllm_dfloat.device.unit_coder does the same work on a GPU, with the
same interface.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numba import njit

from vllm_dfloat.codec.arrays import I64Array, U8Array, U16Array, U32Array, U64Array
from vllm_dfloat.codec.encode import count_exponents
from vllm_dfloat.codec.layout import SYMBOL_SHIFT
from vllm_dfloat.codec.threads import num_threads, over_tiles
from vllm_dfloat.dfloat11.decode import decode_range
from vllm_dfloat.dfloat11.format import BLOCK_WINDOWS
from vllm_dfloat.dfloat11.huffman import EOF, Codes
from vllm_dfloat.dfloat11.unit import Unit

CHUNK = 2048  # weights; a thread takes whole chunks


@dataclass(frozen=True, eq=False)
class Book:
    """The code of each exponent, and of the end marker.

    Attributes:
        lengths: uint8 [256], bits of each code, 0 if the exponent does not occur.
        values: uint32 [256], the codes, right-aligned.
        eof: the end marker's code and length.
    """

    lengths: U8Array
    values: U32Array
    eof: tuple[int, int]


def make_book(codes: Codes) -> Book:
    """Return these codes as arrays."""
    book = Book(np.zeros(256, np.uint8), np.zeros(256, np.uint32), codes[EOF])
    for symbol, (value, length) in codes.items():
        if symbol != EOF:
            book.lengths[symbol], book.values[symbol] = length, value
    return book


@dataclass(frozen=True, eq=False)
class Codes64:
    """Windows of a stream while they are written, from the start of a block on.

    Attributes:
        words: uint64, 64 bits of the stream each, the first bit uppermost; zeros where nothing is written yet.
        first_bits: uint8, the bit of each window at which its first code starts.
        begins: int64, the first weight of each block, counted in the piece.
    """

    words: U64Array
    first_bits: U8Array
    begins: I64Array


class Coder(Protocol):
    """Works on flat pieces of BF16 bits, uint16."""

    def count(self, weights: U16Array) -> I64Array:
        """Return how often each exponent occurs, int64 [256]."""

    def write(self, weights: U16Array, book: Book, bit: int, out: Codes64) -> int:
        """Write the codes of a piece into `out` from `bit` on; return the bit after them.

        Bits already in a word stay. first_bits and begins are set for windows and blocks that start after `bit`, up to
        one that starts at the returned bit.
        """

    def sign_mantissa(self, weights: U16Array) -> U8Array:
        """Return the sign and the mantissa of each weight in one byte."""

    def equals(self, unit: Unit, start: int, weights: U16Array) -> bool:
        """Return whether the weights of a unit from `start` on are equal to these, bit for bit.

        Raises:
            FormatError: the codes contradict the unit's gaps, positions or tables.
        """


class CpuCoder:
    """The coder that runs everywhere."""

    def count(self, weights: U16Array) -> I64Array:
        return count_exponents(weights)

    def write(self, weights: U16Array, book: Book, bit: int, out: Codes64) -> int:
        starts = _chunk_starts(weights, book.lengths, bit)
        before = out.words[bit >> 6]
        ends = over_tiles(
            _write_chunks, starts.size, weights, starts, book.lengths, book.values,
            out.words, out.first_bits, out.begins,
        )  # fmt: skip
        out.words[bit >> 6] |= before
        for window, _, tail in ends:
            out.words[window] |= np.uint64(tail)
        window, used, _ = ends[-1]
        return int(64 * window + used)

    def sign_mantissa(self, weights: U16Array) -> U8Array:
        out = np.empty(weights.size, np.uint8)
        over_tiles(_split_chunks, -(-weights.size // CHUNK), weights, out)
        return out

    def equals(self, unit: Unit, start: int, weights: U16Array) -> bool:
        return np.array_equal(decode_range(unit, start, start + weights.size), weights)


def _chunk_starts(weights: U16Array, lengths: U8Array, bit: int) -> I64Array:
    """Return the bit at which the codes of each chunk start; with one thread only that of the first is right."""
    bits = np.zeros(-(-weights.size // CHUNK) + 1, np.int64)
    bits[0] = bit
    if num_threads() > 1:
        over_tiles(_measure_chunks, bits.size - 1, weights, lengths, bits[1:])
        np.cumsum(bits, out=bits)
    return bits[:-1]


@njit(nogil=True, cache=True)
def _measure_chunks(first, last, flat, lengths, bits):  # type: ignore[no-untyped-def]
    for chunk in range(first, last):
        total = 0
        for i in range(chunk * CHUNK, min((chunk + 1) * CHUNK, flat.size)):
            total += lengths[(flat[i] >> SYMBOL_SHIFT) & 0xFF]
        bits[chunk] = total


@njit(nogil=True, cache=True)
def _write_chunks(  # type: ignore[no-untyped-def]
    first, last, flat, starts, lengths, values, words, first_bits, begins
):
    """Write the codes of chunks window by window, most significant bit first, with first_bits and begins.

    Returns the window in which the last code ends, how many of its bits are used, and those bits. They are not written
    here: another thread may be writing that word, which the next range starts in.
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
            begins[window // BLOCK_WINDOWS] = i + 1
    tail = pending << np.uint64(64 - used) if used else np.uint64(0)
    return window, used, tail


@njit(nogil=True, cache=True)
def _split_chunks(first, last, flat, out):  # type: ignore[no-untyped-def]
    for i in range(first * CHUNK, min(last * CHUNK, flat.size)):
        out[i] = (flat[i] >> 8 & 0x80) | (flat[i] & 0x7F)
