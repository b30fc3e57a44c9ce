"""Run a compiled kernel without a GPU: the instructions of PTX that our products and vLLM's use, on NumPy arrays.

All threads of a block are in one process: each step runs the threads that are furthest behind. The tensor cores are
those of tensor_cores.py. An instruction or a form of one that no such kernel uses is an error.
"""

import ptx_arithmetic
import ptx_memory
import ptx_steps
from ptx_program import Instruction
from ptx_state import State

_MOST_STEPS = 200_000
_INSTRUCTIONS = ptx_arithmetic.INSTRUCTIONS | ptx_memory.INSTRUCTIONS | ptx_steps.INSTRUCTIONS


class Machine(State):
    """One block of threads that runs a program."""

    def run(self) -> None:
        """Run until all threads have ended."""
        end = len(self.program.code)
        steps = 0
        while True:
            at = int(self.pc.min())
            if at == end:
                return
            here = self.pc == at
            one = self.program.code[at]
            self.active = here
            if one.predicate:
                self.active = here & ((self.read(one.predicate) != 0) ^ one.negated)
            self.pc[here] += 1
            if one.base in _INSTRUCTIONS:
                _INSTRUCTIONS[one.base](self, one)
            else:
                self._control(one)
            steps += 1
            assert steps < _MOST_STEPS, "the kernel does not end"

    def _control(self, one: Instruction) -> None:
        if one.base == "bra":
            self.pc[self.active] = self.program.labels[str(one.operands[0])]
        elif one.base == "ret":
            self.pc[self.active] = len(self.program.code)
        elif one.base == "bar":
            self._barrier(one)
        elif one.base == "trap":
            assert not self.active.any(), "the kernel was stopped"
        else:  # what other units have written is seen at once
            assert one.base == "fence", one

    def _barrier(self, one: Instruction) -> None:
        """Let no thread through before all of the block, or of its warp, have come; these must come together."""
        here = self.active.reshape(-1, 32) if one.kinds[0] == "warp" else self.active[None]
        assert (here.all(1) | ~here.any(1)).all(), "some threads do not come to the barrier"
