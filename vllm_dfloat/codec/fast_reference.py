"""The oracle of the fast layout: a slow and obvious decoder that every other decoder is tested against.

It follows docs/fast-layout.md line by line, one weight at a time, and shares no code with the fast paths.
"""

import numpy as np

from vllm_dfloat.codec.arrays import U16Array
from vllm_dfloat.codec.fast_layout import FastTensor


def decode(fast: FastTensor) -> U16Array:
    """Return the BF16 bits, uint16 [rows, cols], that `fast` was encoded from."""
    lay = fast.layout
    out = np.zeros((lay.rows, lay.cols), np.uint16)
    for row in range(lay.rows):
        for col in range(lay.cols):
            out[row, col] = _weight(fast, row, col)
    for tile in range(lay.num_tiles):
        _patch(fast, tile, out)
    return out


def _weight(fast: FastTensor, row: int, col: int) -> int:
    """Return the bits that the two planes hold for a weight."""
    in_four = (0, 2, 1, 3)[col % 4]
    low = int(fast.low[row, col // 4 * 4 + in_four])
    word = int(fast.high[row, col // 16, col % 16 // 8])
    if col % 8 >= 4:  # the second four nibbles of a word are stored rotated left by 4
        word = (word >> 4 | word << 28) & 0xFFFFFFFF
    sign_and_distance = (word >> 8 * in_four) & 0x87
    return (sign_and_distance + fast.layout.base // 2) << 8 | low


def _patch(fast: FastTensor, tile: int, out: U16Array) -> None:
    """Put the escapes of a tile, or the whole tile, in place."""
    first, last = int(fast.starts[tile]), int(fast.starts[tile + 1])
    row, col = tile // fast.layout.tile_cols * 64, tile % fast.layout.tile_cols * 128
    if last - first == 4096:
        words = fast.entries[first:last]
        weights = np.stack([words & 0xFFFF, words >> 16], axis=1).astype(np.uint16)
        target = out[row : row + 64, col : col + 128]
        target[:] = weights.reshape(64, 128)[: target.shape[0], : target.shape[1]]
        return
    for entry in fast.entries[first:last].tolist():
        position = entry >> 16
        out[row + position // 128, col + position % 128] = entry & 0xFFFF
