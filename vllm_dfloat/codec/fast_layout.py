"""The fast layout: a BF16 weight matrix in about 12.01 bits per weight, decoded with a few instructions.

The low byte of a weight (the lowest exponent bit and the mantissa) is stored as it is. Of the high byte the sign stays,
and the upper 7 exponent bits become 3: their distance from those of `base`. So 16 exponents, from `base` on, can be
written, and a nibble holds sign and distance. The weights with another exponent are listed per tile, as *escapes*. The
bytes are written down in docs/fast-layout.md; in the code this file alone knows them.

A payload is one run of bytes, each section starting on a multiple of 16:

    low      uint8[rows, pitch]             low bytes, each four in `BYTE_ORDER`
    high     uint32[rows, pitch / 16, 2]    8 nibbles a word
    starts   uint32[num_tiles + 1]          first entry of each tile; tiles of 64 x 128 weights, row by row
    entries  uint32[num_entries]            escapes of a tile, or all its weights
"""

from dataclasses import dataclass

import numpy as np

from vllm_dfloat.codec.arrays import U8Array, U32Array
from vllm_dfloat.codec.layout import aligned

FAST_LAYOUT_VERSION = 1

GROUP = 16  # weights that 16 low bytes and 2 words of nibbles hold
HALF = 8  # weights of a word of nibbles
BYTE_ORDER = (0, 2, 1, 3)  # of four weights in a word: pairs that decoding joins lie 2 bytes apart

TILE_ROWS, TILE_COLS = 64, 128
TILE_WEIGHTS = TILE_ROWS * TILE_COLS
RAW_ENTRIES = TILE_WEIGHTS // 2  # a tile with as many holds all its weights, two an entry
MAX_ESCAPES = 512  # a tile with more is held raw

CODES = 8  # distances that 3 bits can hold
MAX_HALF_BASE = 128 - CODES
SIGN_CODE_MASK = 0x87  # the bits of a high byte that a nibble holds: the sign and the distance
# At 14 bits the packed layout is much smaller, and as BF16 a product is almost as fast.
MAX_BITS_PER_WEIGHT = 14
MAX_ENTRIES = 1 << 31


@dataclass(frozen=True)
class FastLayout:
    """Sizes and byte offsets of a matrix [rows, cols] in the fast layout; all follow from these four numbers.

    Attributes:
        rows, cols: shape of the matrix.
        base: the lowest of the 16 exponents that need no escape; even, 0 to 240.
        num_entries: escapes of all tiles, and RAW_ENTRIES per raw tile.
    """

    rows: int
    cols: int
    base: int
    num_entries: int

    @property
    def numel(self) -> int:
        return self.rows * self.cols

    @property
    def num_groups(self) -> int:
        """Groups of 16 weights in a row; the last one is filled up with zeros."""
        return -(-self.cols // GROUP)

    @property
    def pitch(self) -> int:
        """Weights from one row to the next."""
        return self.num_groups * GROUP

    @property
    def tile_rows(self) -> int:
        """Rows of tiles; the last one may be partial."""
        return -(-self.rows // TILE_ROWS)

    @property
    def tile_cols(self) -> int:
        """Columns of tiles; the last one may be partial."""
        return -(-self.cols // TILE_COLS)

    @property
    def num_tiles(self) -> int:
        return self.tile_rows * self.tile_cols

    @property
    def low_offset(self) -> int:
        return 0

    @property
    def high_offset(self) -> int:
        return self.rows * self.pitch

    @property
    def starts_offset(self) -> int:
        return self.high_offset + aligned(self.rows * self.pitch // 2)

    @property
    def entries_offset(self) -> int:
        return self.starts_offset + aligned(4 * (self.num_tiles + 1))

    @property
    def num_bytes(self) -> int:
        """Bytes of the payload, all metadata included."""
        return self.entries_offset + aligned(4 * self.num_entries)

    @property
    def is_small(self) -> bool:
        """Whether the layout takes less than MAX_BITS_PER_WEIGHT, so that a matrix is held so."""
        return 8 * self.num_bytes < MAX_BITS_PER_WEIGHT * self.numel


@dataclass(frozen=True)
class FastTensor:
    """One weight matrix in the fast layout.

    Attributes:
        layout: sizes and offsets.
        payload: uint8 [layout.num_bytes], C-contiguous; the sections below are views of it.
        name: the tensor's name, for messages.
    """

    layout: FastLayout
    payload: U8Array
    name: str = ""

    @property
    def num_bytes(self) -> int:
        return self.layout.num_bytes

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.num_bytes / self.layout.numel

    @property
    def low(self) -> U8Array:
        lay = self.layout
        return self.payload[: lay.high_offset].reshape(lay.rows, lay.pitch)

    @property
    def high(self) -> U32Array:
        lay = self.layout
        section = self.payload[lay.high_offset : lay.high_offset + lay.rows * lay.pitch // 2]
        return section.view(np.uint32).reshape(lay.rows, lay.num_groups, GROUP // HALF)

    @property
    def starts(self) -> U32Array:
        start = self.layout.starts_offset
        return self.payload[start : start + 4 * (self.layout.num_tiles + 1)].view(np.uint32)

    @property
    def entries(self) -> U32Array:
        start = self.layout.entries_offset
        return self.payload[start : start + 4 * self.layout.num_entries].view(np.uint32)


def size(rows: int, cols: int) -> int:
    """Return what the seal of a matrix's descriptor covers; it is no number of tiles, which is below 2**32."""
    return rows << 32 | cols


def half_base_of(counts: list[int]) -> int:
    """Return half of the best base: of its 16 exponents occur most weights; the smallest such base.

    Args:
        counts: how often the upper 7 exponent bits of the matrix have each value, 0 to 127.
    """
    sums = [sum(counts[first : first + CODES]) for first in range(MAX_HALF_BASE + 1)]
    return sums.index(max(sums))
