"""The rules of every packed tensor, checked independently of the code that encodes and decodes."""

import numpy as np

from vllm_dfloat.codec.layout import (
    LANE_LENGTH_UNIT,
    LENGTH_MASK,
    MAX_CODE_BITS,
    MAX_WORDS,
    MIN_CODE_BITS,
    PAD_WORDS,
    PackedTensor,
)


def assert_follows_layout(packed: PackedTensor) -> None:
    """Check sizes, tile starts, lane lengths and the LUT against each other, by the rules of docs/packed-layout.md."""
    lay = packed.layout
    assert MIN_CODE_BITS <= lay.code_bits <= MAX_CODE_BITS
    assert 0 <= lay.num_words < MAX_WORDS
    assert packed.payload.dtype == np.uint8
    assert packed.payload.shape == (lay.num_bytes,), "bytes of the payload"
    if packed.is_raw:
        return
    starts = packed.tile_starts.astype(np.int64)
    assert (starts[0], starts[-1]) == (0, lay.num_words - PAD_WORDS), "words of all tiles"
    lane_bits = packed.lane_lengths.astype(np.int64).sum(axis=1) * LANE_LENGTH_UNIT
    assert (np.diff(starts) == -(-lane_bits // 32)).all(), "words of each tile"
    assert int((packed.lut & np.uint16(LENGTH_MASK)).max()) <= lay.code_bits, "the longest code"
    assert not packed.words[lay.num_words - PAD_WORDS :].any(), "padding"
