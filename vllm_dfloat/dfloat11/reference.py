"""Decode a DFloat11 unit slowly and obviously: the oracle for decode.py and the kernel.

It follows the description of the format: the stored `luts` with their row of lengths, one window after
another, one code after another. It is not fast, and makes no tables of its own.
"""

from __future__ import annotations

import numpy as np

from vllm_dfloat.codec.arrays import U8Array, U16Array
from vllm_dfloat.dfloat11.unit import Unit
from vllm_dfloat.errors import FormatError


def decode(unit: Unit) -> U16Array:
    """Return all weights of the unit as BF16 bits, uint16 [N].

    Raises:
        FormatError: a code without a length, or windows that do not fit together.
    """
    stream = int.from_bytes(unit.stream.tobytes() + bytes(16), "big")
    total_bits = 8 * (len(unit.stream) + 16)
    rows = unit.luts.tolist()
    exponents: list[int] = []
    for window in range(-(-len(unit.stream) // 8)):
        if window % 512 == 0 and len(exponents) != unit.positions[window // 512]:
            raise FormatError(f"{unit.where}: window {window} starts at weight {len(exponents)}.")
        position = 64 * window + _gap(unit.gaps, window)
        while position < 64 * (window + 1) and len(exponents) < unit.num_weights:
            peek = (stream >> (total_bits - position - 32)) & 0xFFFFFFFF
            symbol = _look_up(rows, peek)
            if symbol is None:
                raise FormatError(f"{unit.where}: no code at bit {position} of the stream.")
            exponents.append(symbol)
            position += rows[-1][symbol]
        if len(exponents) < unit.num_weights and position != 64 * (window + 1) + _gap(
            unit.gaps, window + 1
        ):
            raise FormatError(f"{unit.where}: window {window} ends at bit {position}.")
    if len(exponents) != unit.num_weights:
        raise FormatError(f"{unit.where}: {len(exponents)} codes; {unit.num_weights} expected.")
    sign_mantissa = unit.sign_mantissa.astype(np.uint16)
    exponent = np.array(exponents, np.uint16)
    return np.asarray((sign_mantissa & 0x80) << 8 | exponent << 7 | sign_mantissa & 0x7F, np.uint16)


def _gap(gaps: U8Array, window: int) -> int:
    """Return field `window`: five bits, most significant first, packed back to back."""
    byte, bit = divmod(5 * window, 8)
    pair = int.from_bytes(gaps[byte : byte + 2].tobytes().ljust(2, b"\0"), "big")
    return pair >> (11 - bit) & 31


def _look_up(rows: list[list[int]], peek: int) -> int | None:
    """Return the symbol whose code starts the 32 bits `peek`, None if there is none."""
    row = 0
    for shift in (24, 16, 8, 0):
        value = rows[row][peek >> shift & 0xFF]
        if value < 240:
            return value if rows[-1][value] else None
        row = 256 - value
    return None
