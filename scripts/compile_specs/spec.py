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

from vllm_dfloat.kernels.fast_escapes import PLAIN

NVIDIA = ("sm_80", "sm_89", "sm_90", "sm_100")
AMD = ("gfx942", "gfx950")  # MI300 and MI350; their waves have 64 threads
TARGETS = (*NVIDIA, *AMD)
# Forms of inline PTX, for which a launcher takes the plain one on an AMD GPU.
_PLAIN = {"PRMT": False, "FORM": PLAIN}
_HOPPER_ONLY = ("WAITS",)
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
        max_registers: most registers per thread on an NVIDIA GPU, or None.
        on_amd: constants that differ on an AMD GPU; WARPS is the number of warps there.
        weights_per_program: weights that one program handles; a typical number if it varies.
        loop_runs: how often the compiled loops run, to count executed instructions; 1 if it varies.
        counts_outer_loops: whether that holds for a loop with others in it too; else it is counted as run once.
        has_rare_paths: whether what runs where tiles have no escapes and are not raw is counted by itself too.
    """

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any] = field(default_factory=dict)
    aligned_args: tuple[str, ...] = ()
    num_warps: int = 4
    max_registers: int | None = None
    on_amd: dict[str, Any] = field(default_factory=dict)
    weights_per_program: int = 1
    loop_runs: int = 1
    counts_outer_loops: bool = True
    has_rare_paths: bool = False

    def compile(self, target: str, **options: Any) -> Any:
        """Return Triton's compiled kernel for one of TARGETS; needs no GPU."""
        attrs = {
            (self.fn.arg_names.index(arg),): [["tt.divisibility", _ALIGNMENT]]
            for arg in self.aligned_args
        }
        constexprs = dict(self.constexprs)
        if target != "sm_90":
            constexprs |= {name: False for name in _HOPPER_ONLY if name in constexprs}
        if target in AMD:
            constexprs |= {name: form for name, form in _PLAIN.items() if name in constexprs}
            constexprs |= self.on_amd
            gpu = GPUTarget("hip", target, 64)
        else:
            gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
            options = {"maxnreg": self.max_registers} | options
        source = ASTSource(self.fn, self.signature, constexprs, attrs)
        num_warps = constexprs.get("WARPS", self.num_warps)
        return triton.compile(source, target=gpu, options={"num_warps": num_warps, **options})
