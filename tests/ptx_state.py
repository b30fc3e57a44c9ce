"""What the threads of a block have: registers, shared memory, and their place in the code; as NumPy arrays.

A register is uint64 [threads], whatever its size; a negative number has its bits.
"""

from collections.abc import Callable

import numpy as np
from ptx_program import Operand, Program
from tensor_cores import product

U64 = np.uint64


class Begun:
    """Work that an instruction begins and another waits for, in groups: done at once, or if `is_late` then."""

    def __init__(self, is_late: bool) -> None:
        self._is_late = is_late
        self._groups: list[list[Callable[[], None]]] = [[]]

    def add(self, work: Callable[[], None]) -> None:
        if self._is_late:
            self._groups[-1].append(work)
        else:
            work()

    def commit(self) -> None:
        self._groups.append([])

    def wait(self, most: int) -> None:
        """Return when no more than `most` groups are not done."""
        while len(self._groups) - 1 > most:
            for work in self._groups.pop(0):
                work()


class State:
    """One block of threads, with global memory as bytes from address 0 on, and shared memory of its own.

    Attributes:
        active: bool [threads]: for which threads the current instruction runs.
        pc: int64 [threads]: the next instruction of each.
        copies, steps: what was begun and need not be done before it is waited for.
        together: how many columns the tensor cores add at a time.
    """

    def __init__(
        self, program: Program, memory: np.ndarray, parameters: list[int], block: tuple[int, int],
        blocks: tuple[int, int], shared: int, together: int = 8, is_late: bool = False,
    ) -> None:  # fmt: skip
        self.program, self.memory = program, memory
        self.parameters = parameters
        self.shared = np.zeros(shared + 16, np.uint8)
        n = program.threads
        self.registers: dict[str, np.ndarray] = {}
        self.tid = np.arange(n)
        special = {"%tid.x": self.tid, "%laneid": self.tid % 32}
        special |= {"%ctaid.x": block[0], "%ctaid.y": block[1], "%nctaid.x": blocks[0]}
        special |= {"%nctaid.y": blocks[1], "%ntid.x": n}
        self.special = {k: np.broadcast_to(np.asarray(v, U64), n) for k, v in special.items()}
        self.pc = np.zeros(n, np.int64)
        self.active = np.ones(n, bool)
        self.copies, self.steps = Begun(is_late), Begun(is_late)
        self.together = together

    def meet(self, address: np.ndarray, active: np.ndarray, size: int) -> None:
        """Note accesses to `size` bytes of shared memory each; [times, threads that may do so at the same time]."""

    def multiply(self, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        """Return c + a @ b as the tensor cores add."""
        return product(a, b, c, self.together)

    def read(self, operand: Operand) -> np.ndarray:
        """Return a register, or a number for each thread."""
        assert isinstance(operand, str)
        n = self.program.threads
        if operand in self.special:
            return self.special[operand]
        if operand[0] == "%":
            return self.registers.setdefault(operand, np.zeros(n, U64))
        if operand == "global_smem":
            return np.zeros(n, U64)
        if operand[:2] in ("0f", "0F"):
            return np.full(n, int(operand[2:], 16), U64)
        return np.full(n, int(operand.rstrip("U"), 0) & 0xFFFF_FFFF_FFFF_FFFF, U64)

    def write(self, operand: Operand, value: np.ndarray, bits: int) -> None:
        """Set a register of so many bits for the active threads; `_` is none."""
        assert isinstance(operand, str)
        if operand == "_":
            return
        value = np.asarray(value)
        wide = value.astype(np.int64).view(U64) if value.dtype.kind == "i" else value.astype(U64)
        if bits < 64:
            wide = wide & U64((1 << bits) - 1)
        self.registers[operand] = np.where(self.active, wide, self.read(operand))

    def address(self, operand: Operand) -> np.ndarray:
        """Return the address of each thread, for an operand in brackets."""
        assert isinstance(operand, str)
        parts = [part.strip() for part in operand.strip("[] ").split("+")]
        total = self.read(parts[0]).astype(np.int64)
        for part in parts[1:]:
            total = total + self.read(part).astype(np.int64)
        return total

    def load(self, memory: np.ndarray, address: np.ndarray, size: int) -> np.ndarray:
        """Return `size` bytes at each active thread's address, as numbers."""
        return self.fetch(memory, address, size)

    def store(self, memory: np.ndarray, address: np.ndarray, value: np.ndarray, size: int) -> None:
        """Write `size` bytes at each active thread's address."""
        self.put(memory, address, value, size)

    def change(
        self, memory: np.ndarray, address: np.ndarray, value: np.ndarray, size: int, combine: np.ufunc
    ) -> np.ndarray:  # fmt: skip
        """Combine what is at each active thread's address, one after the other; return what each found there."""
        active, found = self.active, np.zeros(self.program.threads, U64)
        for thread in np.flatnonzero(active):
            self.active = self.tid == thread
            found[thread] = self.fetch(memory, address, size)[thread]
            self.put(memory, address, combine(found, value), size)
        self.active = active
        return found

    def fetch(self, memory: np.ndarray, address: np.ndarray, size: int) -> np.ndarray:
        """Do what `load` does, whoever else accesses the same bytes."""
        safe = np.where(self.active, address, 0)
        assert safe.min() >= 0
        assert safe.max() + size <= len(memory)
        assert not (safe % size).any(), "an address that no GPU reads"
        found = memory[safe[:, None] + np.arange(size)]
        return np.ascontiguousarray(found).view(f"<u{size}")[:, 0].astype(U64)

    def put(self, memory: np.ndarray, address: np.ndarray, value: np.ndarray, size: int) -> None:
        """Do what `store` does, likewise."""
        where = address[self.active]
        if len(where):
            assert where.min() >= 0
            assert where.max() + size <= len(memory)
            each = value[self.active].astype(f"<u{size}")[:, None].view(np.uint8)
            memory[where[:, None] + np.arange(size)] = each
