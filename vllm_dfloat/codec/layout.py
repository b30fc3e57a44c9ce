"""The packed layout: how one BF16 weight matrix lies in memory while a model is served.

A matrix is flattened row by row and cut into tiles of `TILE_WEIGHTS` weights. A tile has `LANES` lanes; a lane owns
`LANE_WEIGHTS` weights and its own codes, so any lane can be decoded alone and one pass suffices. The bytes, with a
worked example in bits, are written down in docs/packed-layout.md; in the code this file alone knows them.

A payload is one run of bytes:

    lut            uint16[1 << code_bits]        symbol << 7 | code length; 0 where no code leads
    sign_mantissa  uint32[num_tiles, 8, 16, 4]   sign and mantissa bits, in the order in which decoding merges them
    lane_lengths   uint8[num_tiles, 16]          bits of each lane / LANE_LENGTH_UNIT, rounded up
    tile_starts    uint32[num_tiles + 1]         first word of each tile in `words`; then padding to 16 bytes
    words          uint32[num_words]             the codes, most significant bit first; the last PAD_WORDS are zero

or, where coding would not make it smaller, the BF16 bits themselves, padded to whole tiles (`is_raw`).
"""

from dataclasses import dataclass

import numpy as np

from vllm_dfloat.codec.arrays import U8Array, U16Array, U32Array

LAYOUT_VERSION = 3

LANES = 16
STEPS = 16  # a lane's weights come in steps of STEP_WEIGHTS, so that a lane stores 16 bytes at once
STEP_WEIGHTS = 8
LANE_WEIGHTS = STEPS * STEP_WEIGHTS
TILE_WEIGHTS = LANES * LANE_WEIGHTS

# The longest code of a matrix. Never longer than 10: 3 codes fit a window of 32 bits. With 8 bits the LUT is 4 lines of
# the L1 cache and 32 threads look up in about as many turns; with 10 it is 16 lines, and 13 turns (docs/kernels.md).
MIN_CODE_BITS = 8  # below this, 256 symbols would not fit
MAX_CODE_BITS = 10
LANE_LENGTH_UNIT = 8

SYMBOL_SHIFT = 7  # where a BF16 weight holds its exponent, and a LUT entry its symbol
LENGTH_MASK = 15  # code length of a LUT entry: 4 bits
SIGN_MANTISSA_MASK = 0x807F807F  # the bits of two BF16 weights that are not exponent
MAX_WORDS = 1 << 31
# Words that a lane can read after its first one, whatever the bytes say: the longest codes of a LUT, a window, and
# the word after it, which kernels load before they need it.
PAD_WORDS = LANE_WEIGHTS * LENGTH_MASK // 32 + 3
ALIGNMENT = 16


def aligned(num_bytes: int) -> int:
    """Return a number of bytes, rounded up to a multiple of ALIGNMENT."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class PackedLayout:
    """Sizes and byte offsets of a packed matrix [rows, cols]; all follow from these four numbers."""

    rows: int
    cols: int
    num_words: int  # words of code, padding included; 0 if the payload is raw BF16
    code_bits: int = MIN_CODE_BITS

    @property
    def numel(self) -> int:
        return self.rows * self.cols

    @property
    def num_tiles(self) -> int:
        return -(-self.numel // TILE_WEIGHTS)

    @property
    def padded_numel(self) -> int:
        """Weights a decoder writes: whole tiles, the last one filled up."""
        return self.num_tiles * TILE_WEIGHTS

    @property
    def is_raw(self) -> bool:
        return self.num_words == 0

    @property
    def sign_mantissa_offset(self) -> int:
        return 2 << self.code_bits

    @property
    def lane_lengths_offset(self) -> int:
        return self.sign_mantissa_offset + self.padded_numel

    @property
    def tile_starts_offset(self) -> int:
        return self.lane_lengths_offset + self.num_tiles * LANES

    @property
    def words_offset(self) -> int:
        return self.tile_starts_offset + aligned(4 * (self.num_tiles + 1))

    @property
    def num_bytes(self) -> int:
        """Bytes of the payload, all metadata included."""
        if self.is_raw:
            return 2 * self.padded_numel
        return self.words_offset + 4 * self.num_words


@dataclass(frozen=True)
class PackedTensor:
    """One weight matrix in the packed layout.

    Attributes:
        layout: sizes and offsets.
        payload: uint8 [layout.num_bytes], C-contiguous; the sections below are views of it.
        name: the tensor's name, for messages.
    """

    layout: PackedLayout
    payload: U8Array
    name: str = ""

    @property
    def is_raw(self) -> bool:
        return self.layout.is_raw

    @property
    def num_bytes(self) -> int:
        return self.layout.num_bytes

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.num_bytes / self.layout.numel if self.layout.numel else 0.0

    @property
    def lut(self) -> U16Array:
        return self.payload[: self.layout.sign_mantissa_offset].view(np.uint16)

    @property
    def sign_mantissa(self) -> U32Array:
        lay = self.layout
        section = self.payload[lay.sign_mantissa_offset : lay.lane_lengths_offset]
        return section.view(np.uint32).reshape(lay.num_tiles, STEPS // 2, LANES, 4)

    @property
    def lane_lengths(self) -> U8Array:
        lay = self.layout
        section = self.payload[lay.lane_lengths_offset : lay.tile_starts_offset]
        return section.reshape(lay.num_tiles, LANES)

    @property
    def tile_starts(self) -> U32Array:
        start = self.layout.tile_starts_offset
        return self.payload[start : start + 4 * (self.layout.num_tiles + 1)].view(np.uint32)

    @property
    def words(self) -> U32Array:
        return self.payload[self.layout.words_offset :].view(np.uint32)
