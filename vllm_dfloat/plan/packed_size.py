"""The size of a matrix in the packed layout, from its shape and the bits of its codes."""

from dataclasses import dataclass, replace

import numpy as np

from vllm_dfloat.codec.arrays import I64Array
from vllm_dfloat.codec.huffman import choose_code
from vllm_dfloat.codec.layout import (
    LANE_LENGTH_UNIT,
    LANES,
    PAD_WORDS,
    PackedLayout,
)

DESC_BYTES = 32  # the descriptor beside each payload: int64 [4]
STATUS_BYTES = 4  # of the scratch, per tile
# Trained matrices take 2.60 to 2.77 bits with an unlimited code each, and 0.05 more with one of 8 bits.
ASSUMED_CODE_BITS = 2.7
FILLER_BITS = 2  # the shortest code, which fills up the last tile


@dataclass(frozen=True)
class Packed:
    """Bytes of a compressed weight, and of the buffer for decoding it."""

    num_bytes: int
    scratch_bytes: int
    is_raw: bool


def packed_size(rows: int, cols: int, code_bits: float) -> Packed:
    """Return the size of a matrix [rows, cols] whose exponents take `code_bits` bits each on average.

    Only the size of the codes is estimated, and a LUT for longer codes than usual is not counted. The bits of a lane
    are rounded up to bytes and those of a tile to words; on average that adds half of the most it can add.
    """
    raw = PackedLayout(rows, cols, 0)
    if not raw.numel:
        return Packed(DESC_BYTES, 0, False)
    bits = raw.numel * code_bits + (raw.padded_numel - raw.numel) * FILLER_BITS
    bits += raw.num_tiles * (LANES * (LANE_LENGTH_UNIT - 1) / 2 + (32 - LANE_LENGTH_UNIT) / 2)
    coded = replace(raw, num_words=int(bits / 32) + PAD_WORDS)
    is_raw = coded.num_bytes >= 2 * raw.numel
    held = (raw if is_raw else coded).num_bytes + DESC_BYTES
    return Packed(held, 2 * raw.padded_numel + STATUS_BYTES * raw.num_tiles, is_raw)


def mean_code_bits(counts: I64Array) -> float:
    """Return the bits per weight of the encoder's code for exponents with these counts, int64 [256]."""
    _, lengths = choose_code(counts)
    return float(np.dot(counts, lengths.astype(np.int64)) / max(1, counts.sum()))
