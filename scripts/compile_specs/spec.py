"""Compile one kernel without a GPU, with the signature and constants that its launcher uses.

The other modules here list every kernel; the kernel report compiles them for several GPUs and counts their registers
and instructions. TRITON_INTERPRET must not be set: with the interpreter, `triton.jit` makes functions that cannot be
compiled.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = (80, 89, 90, 100)  # compute capability times ten
CONSTANT = "constexpr"
_ALIGNMENT = 16  # bytes; Triton's launcher specialises on pointers and sizes divisible by it


@dataclass(frozen=True)
class CompileSpec:
    """One kernel with everything `triton.compile` needs.

    Attributes:
        name: unique name for the report.
        fn: the `triton.jit` function.
        signature: argument name -> Triton type ("*u8", "i32", "constexpr"), every argument.
        constexprs: value of every argument whose type is "constexpr".
        aligned_args: arguments that the launcher guarantees to be divisible by 16.
        num_warps: as launched.
        weights_per_program: weights that one program handles; a typical number if it varies.
        loop_runs: how often the compiled loops run, to count executed instructions; 1 if it varies.
        counts_outer_loops: whether that holds for a loop with others in it too; else it is counted as run once.
    """

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any] = field(default_factory=dict)
    aligned_args: tuple[str, ...] = ()
    num_warps: int = 4
    weights_per_program: int = 1
    loop_runs: int = 1
    counts_outer_loops: bool = True

    def compile(self, capability: int, **options: Any) -> Any:
        """Return Triton's compiled kernel for a capability such as 90 (sm_90); needs no GPU."""
        attrs = {
            (self.fn.arg_names.index(arg),): [["tt.divisibility", _ALIGNMENT]]
            for arg in self.aligned_args
        }
        source = ASTSource(self.fn, self.signature, self.constexprs, attrs)
        target = GPUTarget("cuda", capability, 32)
        return triton.compile(
            source, target=target, options={"num_warps": self.num_warps, **options}
        )
