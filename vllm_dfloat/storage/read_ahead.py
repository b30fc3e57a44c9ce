"""Ask the system for the next bytes of a checkpoint while earlier ones are decoded and encoded.

Tensors are mapped from files, so a byte is read when it is first touched, and the reader waits for it. Threads run some
way ahead and let the system read the pages. They copy nothing: ranks on one machine share the pages.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from vllm_dfloat.storage.stored_tensor import StoredTensor

AHEAD_BYTES = 1 << 30  # how far ahead of the reader
CHUNK_BYTES = 16 << 20
THREADS = 4  # requests at a time: what keeps an NVMe disk or a network file system busy

Value = TypeVar("Value")


class ReadAhead:
    """Runs through parts of files, ahead of a reader that tells where it is.

    Args:
        tensors: what will be read, in that order; tensors of one name count as one.
    """

    def __init__(self, tensors: Sequence[StoredTensor]) -> None:
        self._chunks: list[tuple[int, Path, int, int]] = []  # position, file, first byte, bytes
        self._positions: dict[str, int] = {}
        position = 0
        for tensor in tensors:
            self._positions.setdefault(tensor.name, position)
            for first in range(0, tensor.num_bytes, CHUNK_BYTES):
                size = min(CHUNK_BYTES, tensor.num_bytes - first)
                self._chunks.append((position + first, tensor.file, tensor.begin + first, size))
            position += tensor.num_bytes
        self._reader = 0
        self._next = 0
        self._closed = False
        self._changed = threading.Condition()

    def __enter__(self) -> ReadAhead:
        for _ in range(min(THREADS, len(self._chunks))):
            threading.Thread(target=self._run, daemon=True, name="dfloat11-read-ahead").start()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def reached(self, name: str) -> None:
        """Say that the reader is about to read a tensor."""
        with self._changed:
            self._reader = max(self._reader, self._positions.get(name, 0))
            self._changed.notify_all()

    def _run(self) -> None:
        while (chunk := self._take()) is not None:
            try:
                will_need(*chunk)
            except OSError:
                return  # the reader of the file will say what is wrong with it

    def _take(self) -> tuple[Path, int, int] | None:
        """Wait until the reader is near the next chunk, and return that; None at the end. Skips what it has passed."""
        with self._changed:
            while not self._closed and self._next < len(self._chunks):
                position, file, first, size = self._chunks[self._next]
                if position >= self._reader + AHEAD_BYTES:
                    self._changed.wait()
                    continue
                self._next += 1
                if position + size > self._reader:
                    return file, first, size
            return None


def will_need(file: Path, first: int, size: int) -> None:
    """Let the system read bytes of a file into its cache; does nothing on systems without such a call."""
    if not hasattr(os, "posix_fadvise"):
        return
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, first, size, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)


def read_ahead(
    pairs: Iterable[tuple[str, Value]], tensors: Sequence[StoredTensor]
) -> Iterator[tuple[str, Value]]:
    """Yield the same pairs, and read the files ahead of them.

    Args:
        pairs: (tensor name, anything) in about the order of `tensors`.
        tensors: what will be read (`members.spans` of a compressed checkpoint).
    """
    with ReadAhead(tensors) as ahead:
        for name, value in pairs:
            ahead.reached(name)
            yield name, value
