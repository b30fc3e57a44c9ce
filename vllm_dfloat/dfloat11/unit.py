"""One DFloat11 unit whose six tensors have been checked, and pieces of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from vllm_dfloat.codec.arrays import I32Array, I64Array, U8Array
from vllm_dfloat.dfloat11.format import BLOCK_BYTES, BLOCK_GAP_BYTES, WINDOW_BYTES


@dataclass(frozen=True, eq=False)
class Unit:
    """The checked contents of one unit; the big arrays are mapped from the file.

    Attributes:
        name: module path, such as "model.layers.0".
        where: "file: module path", for messages.
        stream: uint8 [n_bytes], the exponents' codes.
        sign_mantissa: uint8 [N].
        gaps: uint8 [320 * B], five bits per window.
        positions: int64 [B + 1], first weight of each block, then N.
        splits: int64 [m + 1], 0, first weight of each further member, N.
        luts: uint8 [R, 256] as stored.
        tables: int32 [R - 1, 256], the same codes without stale entries (tables.py).
        first_block: number in the stored unit of this one's first block, if this is a piece of it.
    """

    name: str
    where: str
    stream: U8Array
    sign_mantissa: U8Array
    gaps: U8Array
    positions: I64Array
    splits: I64Array
    luts: U8Array
    tables: I32Array
    first_block: int = 0

    @property
    def num_weights(self) -> int:
        return len(self.sign_mantissa)

    @property
    def num_blocks(self) -> int:
        return len(self.positions) - 1

    def blocks_of(self, start: int, stop: int) -> tuple[int, int]:
        """Return the first block that holds weights start to stop - 1 (start < stop), and the one after the last."""
        first = int(np.searchsorted(self.positions, start, "right")) - 1
        return first, int(np.searchsorted(self.positions, stop, "left"))

    def piece(self, first: int, last: int) -> Unit:
        """Return blocks first to last - 1 as a unit of its own, with views of this one's arrays.

        Unless `last` is the end, one more block follows, and the stream has only its first window: codes of the block
        before may end there. It serves to check that end, and cannot be decoded.
        """
        after = min(last + 1, self.num_blocks)
        end = BLOCK_BYTES * last + (WINDOW_BYTES if after > last else 0)
        begin, stop = self.positions[first], self.positions[after]
        return replace(
            self,
            stream=self.stream[BLOCK_BYTES * first : end],
            sign_mantissa=self.sign_mantissa[begin:stop],
            gaps=self.gaps[BLOCK_GAP_BYTES * first : BLOCK_GAP_BYTES * after],
            positions=self.positions[first : after + 1] - begin,
            splits=np.array([0, stop - begin]),
            first_block=self.first_block + first,
        )


def num_blocks(num_bytes: int) -> int:
    """Return how many blocks a stream of `num_bytes` bytes has."""
    return -(-num_bytes // BLOCK_BYTES)


def whole_positions(stored: I64Array, num_bytes: int, num_weights: int) -> I64Array:
    """Return the first weight of each block of a stream of `num_bytes` bytes, then the number of weights.

    `stored` lacks one entry if the last code ends in a block in which no code starts.
    """
    return np.append(stored, num_weights) if len(stored) == num_blocks(num_bytes) else stored
