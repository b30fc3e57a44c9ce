"""A machine for PTX (ptx_races.py) that counts how often threads meet in the banks of shared memory.

Shared memory has 32 banks of 4 bytes. Threads that access 128 bytes together are served at once if no bank has two of
their words, else one after the other. So what a kernel loses by its layout is known without a GPU.
"""

from typing import Any

import numpy as np
from ptx_races import Watched

_BANKS = 32


class Banked(Watched):
    """One block of threads.

    Attributes:
        accesses: how often threads accessed shared memory together.
        conflicts: how often threads were served once more for it.
    """

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.accesses = self.conflicts = 0

    def meet(self, address: np.ndarray, active: np.ndarray, size: int) -> None:
        words = address[:, :, None] // 4 + np.arange(max(1, size // 4))
        for some in (each[here].ravel() for each, here in zip(words, active, strict=True)):
            if len(some):
                self.accesses += 1
                self.conflicts += np.bincount(np.unique(some) % _BANKS).max() - 1
