"""Make the stream of a unit from the codes of its pieces, and with it the gaps and positions of its blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from numba import njit

from vllm_dfloat.codec.arrays import U8Array, U32Array, U64Array
from vllm_dfloat.dfloat11.coder import Book, Coder, Codes64
from vllm_dfloat.dfloat11.format import BLOCK_BITS, BLOCK_GAP_BYTES, BLOCK_WINDOWS
from vllm_dfloat.dfloat11.unit import num_blocks
from vllm_dfloat.errors import FormatError
from vllm_dfloat.storage.pieces import Weights, piece_weights
from vllm_dfloat.storage.progress import Advance

Number = TypeVar("Number", bound=np.generic)


class StreamEncoder:
    """Makes the stream of one unit, once, in pieces of whole blocks."""

    def __init__(
        self,
        members: Sequence[Weights],
        book: Book,
        num_bits: int,
        coder: Coder,
        advance: Advance,
    ) -> None:
        self._members = members
        self._book = book
        self._num_bits = num_bits
        self._coder = coder
        self._advance = advance
        self._gaps: U8Array | None = None
        self._positions: U32Array | None = None

    def gaps(self) -> U8Array:
        """Return uint8 [320 * B]; the stream must have been made."""
        return _made(self._gaps)

    def positions(self) -> U32Array:
        """Return the first weight of each block and the number of weights, little-endian uint32 [B + 1]."""
        return _made(self._positions)

    def pieces(self) -> Iterator[U8Array]:
        """Yield the bytes of the stream; a piece is overwritten by the next one."""
        blocks = num_blocks(-(-self._num_bits // 8))
        gaps = np.empty(BLOCK_GAP_BYTES * blocks, np.uint8)
        positions = np.zeros(blocks + 1, "<u4")
        out = self._buffers()
        bit, block, weight = 0, 0, 0
        for piece in (piece for member in self._members for piece in member.pieces()):
            bit = self._coder.write(piece, self._book, bit, out)
            whole = bit // BLOCK_BITS
            self._check(block + whole, blocks)
            positions[block + 1 : block + 1 + whole] = weight + out.begins[1 : 1 + whole]
            _take_gaps(out, whole, gaps[BLOCK_GAP_BYTES * block :])
            if whole:
                yield _big_endian(out.words[: BLOCK_WINDOWS * whole])
                _move(out, BLOCK_WINDOWS * whole, (bit >> 6) + 1)
            bit -= BLOCK_BITS * whole
            block += whole
            weight += piece.size
            self._advance(piece.size)
        self._check(block + bool(bit), blocks)
        if bit:
            self._end(out, bit)
            _take_gaps(out, 1, gaps[BLOCK_GAP_BYTES * block :])
            yield _big_endian(out.words[:BLOCK_WINDOWS])[: -(-bit // 8)]
        positions[-1] = weight
        self._gaps, self._positions = gaps, positions

    def _check(self, block: int, blocks: int) -> None:
        """Refuse more blocks than were measured: their gaps have no room."""
        if block > blocks:
            raise FormatError(
                f"the weights have more than the {self._num_bits} bits of codes that they were measured to have; "
                "expected the same weights in every pass. They were changed meanwhile: begin again."
            )

    def _buffers(self) -> Codes64:
        """Return room for the rest of a block and a whole piece of the longest codes."""
        longest = int(self._book.lengths.max())
        largest = min(piece_weights(), max(member.size for member in self._members))
        blocks = -(-longest * largest // BLOCK_BITS) + 1
        # One window more: the last code may end where another window would start.
        windows = BLOCK_WINDOWS * blocks + 1
        return Codes64(
            np.zeros(windows, np.uint64),
            np.zeros(windows, np.uint8),
            np.zeros(blocks + 1, np.int64),
        )

    def _end(self, out: Codes64, bit: int) -> None:
        """Fill up the last byte with the leading bits of the end marker, and the last block with empty windows."""
        if bit % 8:
            code, length = self._book.eof
            hole = -bit % 8
            fill = code >> (length - hole) if length >= hole else code << (hole - length)
            out.words[bit >> 6] |= np.uint64(fill << (64 - bit % 64 - hole))
        elif out.first_bits[bit >> 6] == bit & 63:
            out.first_bits[bit >> 6] = 0  # no code starts in that window, not even the end marker
        out.first_bits[(bit >> 6) + 1 : BLOCK_WINDOWS] = 0


def _made(array: npt.NDArray[Number] | None) -> npt.NDArray[Number]:
    if array is None:
        raise ValueError("gaps and positions are made with the stream, which must come first")
    return array


def _take_gaps(out: Codes64, blocks: int, gaps: U8Array) -> None:
    _pack_gaps(BLOCK_WINDOWS // 8 * blocks, out.first_bits, gaps)


def _big_endian(words: U64Array) -> U8Array:
    """Return the bytes of windows; swaps them in place."""
    return words.byteswap(inplace=True).view(np.uint8)


def _move(out: Codes64, start: int, stop: int) -> None:
    """Move windows start to stop - 1 to the front, and clear the words after them."""
    rest = stop - start
    for array in (out.words, out.first_bits):
        array[:rest] = array[start:stop].copy()
    out.words[rest:stop] = 0


@njit(nogil=True, cache=True)
def _pack_gaps(groups, first_bits, gaps):  # type: ignore[no-untyped-def]
    """Pack the gaps of 8 windows at a time, 5 bits each, into 5 bytes."""
    for group in range(groups):
        bits = np.uint64(0)
        for k in range(8):
            bits = bits << np.uint64(5) | np.uint64(first_bits[8 * group + k])
        for k in range(5):
            gaps[5 * group + k] = np.uint8(bits >> np.uint64(32 - 8 * k))
