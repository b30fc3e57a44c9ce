"""The oracle: a slow and obvious decoder of the packed layout that every other decoder is tested against.

It follows docs/packed-layout.md line by line, one bit string per lane, and shares no code with the fast paths.
"""

import numpy as np

from vllm_dfloat.codec.arrays import U16Array
from vllm_dfloat.codec.layout import (
    LANE_LENGTH_UNIT,
    LANES,
    STEP_WEIGHTS,
    STEPS,
    TILE_WEIGHTS,
    PackedTensor,
)
from vllm_dfloat.errors import FormatError


def decode(packed: PackedTensor) -> U16Array:
    """Return the BF16 bits, uint16 [rows, cols], that `packed` was encoded from.

    Raises:
        FormatError: a lane's codes do not fill its stated length.
    """
    lay = packed.layout
    if packed.is_raw:
        flat = packed.payload.view(np.uint16)
    else:
        tiles = [_decode_tile(packed, tile) for tile in range(lay.num_tiles)]
        flat = np.concatenate(tiles) if tiles else np.zeros(0, np.uint16)
    return flat[: lay.numel].reshape(lay.rows, lay.cols)


def _decode_tile(packed: PackedTensor, tile: int) -> U16Array:
    out = np.zeros(TILE_WEIGHTS, np.uint16)
    first, last = (int(w) for w in packed.tile_starts[tile : tile + 2])
    bits = "".join(f"{int(word):032b}" for word in packed.words[first:last])
    start = 0
    for lane in range(LANES):
        end = start + int(packed.lane_lengths[tile, lane]) * LANE_LENGTH_UNIT
        symbols = _decode_lane(packed, bits[start:end], f"tile {tile} lane {lane}")
        for step in range(STEPS):
            for j in range(STEP_WEIGHTS):
                sign_mantissa = _sign_mantissa(packed, tile, step, lane, j)
                position = (step * LANES + lane) * STEP_WEIGHTS + j
                out[position] = sign_mantissa | symbols[step * STEP_WEIGHTS + j] << 7
        start = end
    return out


def _decode_lane(packed: PackedTensor, bits: str, where: str) -> list[int]:
    symbols, position, code_bits = [], 0, packed.layout.code_bits
    for _ in range(STEPS * STEP_WEIGHTS):
        entry = int(packed.lut[int(bits[position:].ljust(code_bits, "0")[:code_bits], 2)])
        symbols.append(entry >> 7)
        position += entry & 15
    if -(-position // LANE_LENGTH_UNIT) * LANE_LENGTH_UNIT != len(bits):
        raise FormatError(
            f"{packed.name or 'packed tensor'}: {where}: codes end at bit {position}; the lane has "
            f"{len(bits)} bits. The bytes were changed after encoding; encode the weights again."
        )
    return symbols


def _sign_mantissa(packed: PackedTensor, tile: int, step: int, lane: int, j: int) -> int:
    """Return sign (bit 15) and mantissa (bits 6..0) of weight j of a lane's step."""
    word = int(packed.sign_mantissa[tile, step // 2, lane, (step % 2) * 2 + j // 4])
    if j % 4 >= 2:  # the second pair of a word is stored rotated left by 8
        word = (word >> 8 | word << 24) & 0xFFFFFFFF
    return (word >> 16 * (j % 2)) & 0x807F
