"""The numba code under decode.py: decodes blocks of 4096 stream bytes and checks them.

The exponents of a block go to a small buffer first, several codes per table look-up. A second loop,
which the compiler vectorises, merges them with the sign and mantissa bytes. Array sizes are checked
where a `Unit` is made; every index here is bounded by them, whatever the bytes are.

All loops are in one file: numba's cache compares a function's own file only, and would run what it has
compiled after a function that it calls changed in another.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from vllm_dfloat.codec.arrays import I32Array, I64Array, U8Array, U16Array, U64Array
from vllm_dfloat.dfloat11.format import (
    BLOCK_WINDOWS,
    LENGTH_SHIFT,
    MAX_BLOCK_WEIGHTS,
    POINTER,
    STATUS_BAD_CODE,
    STATUS_COUNT,
    STATUS_GAP,
    STATUS_OK,
)

_WIDE_BITS = 12  # 4096 entries of 8 bytes fit the first-level cache
_WIDE_CODES = 4  # codes per entry at most
# A wide entry: four symbols in bits 0..31, their bits together from 32, their number from 40,
# bits of the first code alone from 48. An entry of 0 means that the first code is longer.
_ALL_BITS, _NUMBER, _FIRST_BITS = 32, 40, 48


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def wide_table(tables: I32Array) -> U64Array:  # pragma: no cover
    """Return for each value of 12 bits up to four codes at its start; 0 if the first code is longer."""
    wide = np.zeros(1 << _WIDE_BITS, np.uint64)
    for prefix in range(1 << _WIDE_BITS):
        used = 0
        entry = 0
        for number in range(_WIDE_CODES):
            bits = (prefix << (32 - _WIDE_BITS) << used) & 0xFFFFFFFF
            found = _look_up(tables, bits)
            length = found >> LENGTH_SHIFT
            if length == 0 or used + length > _WIDE_BITS:
                break
            used += length
            entry |= (found & 0xFF) << (8 * number)
            entry += 1 << _NUMBER
            if number == 0:
                entry |= length << _FIRST_BITS
        wide[prefix] = np.uint64(entry | (used << _ALL_BITS))
    return wide


@njit(cache=True, nogil=True, inline="always")  # type: ignore[untyped-decorator]
def _look_up(tables: I32Array, peek: Any) -> Any:  # pragma: no cover
    """Return `symbol | length << LENGTH_SHIFT` for the code that starts 32 bits, 0 if none."""
    row: Any = 0
    for level in range(4):
        entry = np.int64(tables[row, (peek >> (24 - 8 * level)) & 0xFF])
        if entry & POINTER == 0:
            return entry
        row = entry & 0xFF
    return 0


@njit(cache=True, nogil=True, inline="always")  # type: ignore[untyped-decorator]
def _load_word(stream: U8Array, window: int) -> Any:  # pragma: no cover
    """Return the 64 bits of a window, most significant first, zeros beyond the end."""
    at = 8 * window
    word = np.uint64(0)
    if at + 8 <= stream.size:
        for i in range(8):
            word = (word << np.uint64(8)) | np.uint64(stream[at + i])
    else:
        for i in range(8):
            byte = stream[at + i] if at + i < stream.size else np.uint8(0)
            word = (word << np.uint64(8)) | np.uint64(byte)
    return word


@njit(cache=True, nogil=True, inline="always")  # type: ignore[untyped-decorator]
def load_gap(gaps: U8Array, window: int) -> Any:  # pragma: no cover
    bit = 5 * window
    byte = bit >> 3
    pair = np.int64(gaps[byte]) << 8
    if byte + 1 < gaps.size:
        pair |= np.int64(gaps[byte + 1])
    return (pair >> (11 - (bit & 7))) & 31


@njit(cache=True, nogil=True, inline="always")  # type: ignore[untyped-decorator]
def _peek(word: Any, following: Any, at: int) -> Any:  # pragma: no cover
    """Return 64 bits from bit `at` (0..63) of `word`, continued by `following`."""
    rest = (following >> np.uint64(1)) >> np.uint64(63 - at)
    return (word << np.uint64(at)) | rest


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _decode_window(
    word: Any,
    following: Any,
    at: Any,
    tables: I32Array,
    wide: U64Array,
    symbols: U8Array,
    count: Any,
) -> tuple[Any, Any]:  # pragma: no cover
    """Decode all codes that start in a window; return the end bit (-1 if bad) and the count.

    Writes at most 64 symbols from `count` on, and after them up to 3 that do not count.
    """
    while at < 64:
        inside = at <= 64 - _WIDE_BITS
        if inside:
            entry = wide[(word << np.uint64(at)) >> np.uint64(64 - _WIDE_BITS)]
        else:
            entry = wide[_peek(word, following, at) >> np.uint64(64 - _WIDE_BITS)]
        if entry == 0:
            found = _look_up(tables, np.int64(_peek(word, following, at) >> np.uint64(32)))
            if found == 0:
                return -1, count
            symbols[count] = np.uint8(found & 0xFF)
            count += 1
            at += found >> LENGTH_SHIFT
            continue
        symbols[count] = np.uint8(entry)
        if inside:
            symbols[count + 1] = np.uint8(entry >> np.uint64(8))
            symbols[count + 2] = np.uint8(entry >> np.uint64(16))
            symbols[count + 3] = np.uint8(entry >> np.uint64(24))
            count += np.int64((entry >> np.uint64(_NUMBER)) & np.uint64(7))
            at += np.int64((entry >> np.uint64(_ALL_BITS)) & np.uint64(63))
        else:
            count += 1
            at += np.int64(entry >> np.uint64(_FIRST_BITS))
    return at, count


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _decode_end(
    word: Any,
    following: Any,
    at: Any,
    end: int,
    want: int,
    tables: I32Array,
    symbols: U8Array,
    count: Any,
) -> tuple[Any, Any]:  # pragma: no cover
    """Do as `_decode_window`, one code at a time: stop after `want` codes, refuse a code that ends after bit `end`."""
    while at < 64 and count < want:
        found = _look_up(tables, np.int64(_peek(word, following, at) >> np.uint64(32)))
        at += found >> LENGTH_SHIFT
        if found == 0 or at > end:
            return -1, count
        symbols[count] = np.uint8(found & 0xFF)
        count += 1
    return at, count


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _decode_block(
    block: int,
    want: int,
    is_last: bool,
    stream: U8Array,
    gaps: U8Array,
    tables: I32Array,
    wide: U64Array,
    symbols: U8Array,
) -> tuple[Any, Any, Any]:  # pragma: no cover
    """Decode the `want` codes that start in a block to `symbols`.

    Returns the status, the window in which decoding ended, and what was found there: the number
    of codes so far, or under STATUS_GAP the bit at which the next window's first code starts.

    `is_last`: these are the last codes of the unit; what follows them in the stream does not matter.
    """
    first = block * BLOCK_WINDOWS
    num_windows = (stream.size + 7) // 8
    count = 0
    at = load_gap(gaps, first)
    word = _load_word(stream, first)
    window = first
    for window in range(first, min(first + BLOCK_WINDOWS, num_windows)):
        following = _load_word(stream, window + 1)
        if is_last and count + 64 >= want:
            end = 8 * stream.size - 64 * window
            at, count = _decode_end(word, following, at, end, want, tables, symbols, count)
        else:
            at, count = _decode_window(word, following, at, tables, wide, symbols, count)
        if at < 0:
            return STATUS_BAD_CODE, window, count
        if is_last and count == want:
            return STATUS_OK, window, count
        at -= 64
        if window + 1 >= num_windows:
            break
        if at != load_gap(gaps, window + 1):
            return STATUS_GAP, window, at
        word = following
    return (STATUS_OK if count == want else STATUS_COUNT), window, count


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def decode_blocks(
    begin: int,
    end: int,
    first: int,
    stream: U8Array,
    sign_mantissa: U8Array,
    gaps: U8Array,
    positions: I64Array,
    tables: I32Array,
    wide: U64Array,
    start: int,
    out: U16Array,
    status: I64Array,
) -> None:  # pragma: no cover
    """Decode blocks first + begin to first + end - 1; write those weights that `out`, from weight `start` on, holds."""
    # No block holds more codes; a look-up may write 3 symbols too many.
    symbols = np.empty(MAX_BLOCK_WEIGHTS + 3, np.uint8)
    for i in range(begin, end):
        block = first + i
        here, after = positions[block], positions[block + 1]
        is_last = after == positions[-1]
        if after == here:
            continue
        status[i, 0], status[i, 1], status[i, 2] = _decode_block(
            block, after - here, is_last, stream, gaps, tables, wide, symbols
        )
        if status[i, 0] != STATUS_OK:
            return
        low, high = max(here, start), min(after, start + out.size)
        _merge(
            symbols[low - here : high - here],
            sign_mantissa[low:high],
            out[low - start : high - start],
        )


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _merge(
    symbols: U8Array,
    sign_mantissa: U8Array,
    out: U16Array,
) -> None:  # pragma: no cover
    for i in range(out.size):
        rest = np.uint16(sign_mantissa[i])
        out[i] = (
            ((rest & np.uint16(0x80)) << np.uint16(8))
            | (np.uint16(symbols[i]) << np.uint16(7))
            | (rest & np.uint16(0x7F))
        )
