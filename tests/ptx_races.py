"""A machine for PTX (ptx_machine.py) that stops where warps do not wait for each other.

Its threads go on in step, so it would give right results without barriers too. Here no byte of shared memory may be
written by one warp and read or written by another, or read and then written, without a barrier of the block between;
but several may change it with atomic instructions.
"""

from typing import Any

import numpy as np
from ptx_machine import Machine
from ptx_program import Instruction

_CHANGED = -2  # in place of a warp: several may have, with atomic instructions


class Watched(Machine):
    """One block of threads that runs a program without tensor cores of warp groups."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        size = len(self.shared)
        self._barriers = 0
        # By byte: after how many barriers it was written and read last, by which warp, and by which warps, as bits.
        self._written, self._read = np.full(size, -1), np.full(size, -1)
        self._writer, self._readers = np.zeros(size, np.int64), np.zeros(size, np.int64)

    def load(self, memory: np.ndarray, address: np.ndarray, size: int) -> np.ndarray:
        if memory is self.shared:
            at, warp = self._accessed(address, size)
            self._expect_none(at, warp)
            self._readers[at[self._read[at] < self._barriers]] = 0
            self._read[at] = self._barriers
            np.bitwise_or.at(self._readers, at, np.left_shift(1, warp))
        return super().load(memory, address, size)

    def store(self, memory: np.ndarray, address: np.ndarray, value: np.ndarray, size: int) -> None:
        if memory is self.shared:
            at, warp = self._accessed(address, size)
            self._expect_none(at, warp)
            self._expect_no_reader(at, warp)
            self._written[at], self._writer[at] = self._barriers, warp
        super().store(memory, address, value, size)

    def change(
        self, memory: np.ndarray, address: np.ndarray, value: np.ndarray, size: int, combine: np.ufunc
    ) -> np.ndarray:  # fmt: skip
        if memory is self.shared:
            at, warp = self._accessed(address, size)
            self._expect_none(at, np.where(self._writer[at] == _CHANGED, _CHANGED, warp))
            self._expect_no_reader(at, warp)
            self._written[at], self._writer[at] = self._barriers, _CHANGED
        return super().change(memory, address, value, size, combine)

    def _accessed(self, address: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the bytes that active threads access, and the warp of each."""
        at = (address[self.active][:, None] + np.arange(size)).ravel()
        return at, np.repeat(self.tid[self.active] // 32, size)

    def _expect_none(self, at: np.ndarray, warp: np.ndarray) -> None:
        is_recent = self._written[at] == self._barriers
        assert not (is_recent & (self._writer[at] != warp)).any(), (
            "written by another warp meanwhile"
        )

    def _expect_no_reader(self, at: np.ndarray, warp: np.ndarray) -> None:
        others = self._readers[at] & ~np.left_shift(1, warp)
        assert not (others * (self._read[at] == self._barriers)).any(), "written while others read"

    def _barrier(self, one: Instruction) -> None:
        super()._barrier(one)
        if one.kinds[0] != "warp":
            assert self.active.all(), "some threads do not come to the barrier"
            self._barriers += 1
