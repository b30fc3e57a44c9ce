"""The bits of a weight, piece by piece, so that memory does not grow with its size.

Files are read, not mapped: the pages of a mapping count as memory of the process until the system takes them back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vllm_dfloat.codec.arrays import Bits, U16Array
from vllm_dfloat.codec.threads import num_threads
from vllm_dfloat.errors import FormatError
from vllm_dfloat.storage.file_identity import require_same
from vllm_dfloat.storage.stored_tensor import BITS_DTYPES, StoredTensor, fill

PIECE_WEIGHTS = 1 << 20  # per thread: enough to be worth a thread, few enough for the cache


class Weights(Protocol):
    """The BF16 bits of a weight of any shape.

    Attributes:
        size: how many there are, at least one.
    """

    @property
    def size(self) -> int: ...

    def pieces(self) -> Iterator[U16Array]:
        """Yield all of them in order, flat, `piece_weights()` at a time and the rest at the end.

        A piece may be overwritten when the next one is asked for.
        """


def piece_weights() -> int:
    """Return how many weights a piece has."""
    return PIECE_WEIGHTS * num_threads()


@dataclass(frozen=True)
class ArrayWeights:
    """Weights in memory: flat, uint16."""

    flat: U16Array

    @property
    def size(self) -> int:
        return self.flat.size

    def pieces(self) -> Iterator[U16Array]:
        step = piece_weights()
        for first in range(0, self.flat.size, step):
            yield self.flat[first : first + step]


@dataclass(frozen=True)
class StoredWeights:
    """Weights in a file: a tensor of dtype BF16."""

    tensor: StoredTensor

    @property
    def size(self) -> int:
        return self.tensor.num_bytes // 2

    def pieces(self) -> Iterator[U16Array]:
        yield from read_pieces(self.tensor, 2 * piece_weights())


def read_pieces(
    tensor: StoredTensor, piece_bytes: int, begin: int = 0, end: int | None = None
) -> Iterator[Bits]:
    """Yield bytes begin..end (default: all) of a stored tensor as flat arrays of its bits, all in the same buffer.

    Args:
        tensor: what to read.
        piece_bytes: how much at a time, a multiple of the size of its elements.
        begin, end: where to start and stop within the tensor, multiples of that size too.

    Raises:
        ChangedError: the file is not what it was when its header was read.
        FormatError: it cannot be read.
    """
    dtype = np.dtype(BITS_DTYPES[tensor.dtype])
    end = tensor.num_bytes if end is None else end
    buffer = np.empty(min(piece_bytes, end - begin), np.uint8)
    try:
        with tensor.open() as stream:
            for first in range(begin, end, piece_bytes):
                piece = buffer[: min(piece_bytes, end - first)]
                try:
                    fill(stream.fileno(), piece, tensor.begin + first)
                finally:  # after reading: any earlier write has changed the time by now
                    require_same(tensor.file, tensor.identity, stream.fileno())
                yield piece.view(dtype)
    except OSError as error:
        raise FormatError(
            f"{tensor.where}: cannot be read: {error}. Fetch the file again."
        ) from error
