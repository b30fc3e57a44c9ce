"""The kernels that multiply by the fast layout, in the forms for NVIDIA GPUs."""

import triton.language as tl
from compile_specs.spec import CONSTANT, CompileSpec

from vllm_dfloat.codec import fast_layout
from vllm_dfloat.kernels import fast_matmul, fast_matmul_dot, fast_matmul_gemv
from vllm_dfloat.kernels.configs import DEFAULT
from vllm_dfloat.kernels.fast_escapes import PATCHED, PERMUTED

_CONFIG = DEFAULT.fast_product
_SIZES = dict(
    salt="i64",
    low_bytes="i32",
    rows="i32",
    cols="i32",
    num_x="i32",
    ROWS=CONSTANT,
)
_ALIGNED = ("desc_ptr", "x_ptr", "bias_ptr", "out_ptr", "cols")


def _name(form: str, rows: int, has_parts: bool, kind: int) -> str:
    return f"fast_{form}_{rows}" + "_parts" * has_parts + "_patched" * (kind == PATCHED)


GEMV = [
    CompileSpec(
        name=_name("gemv", rows, has_parts, form),
        fn=fast_matmul_gemv._gemv_kernel,
        signature=dict(
            desc_ptr="*i64", x_ptr="*u32", bias_ptr="*bf16", out_ptr="*fp32" if has_parts else "*u16", **_SIZES,
            TURNS=CONSTANT, GROUPS=CONSTANT, HAS_PARTS=CONSTANT, STAGES=CONSTANT, WARPS=CONSTANT, FORM=CONSTANT,
            HAS_BIAS=CONSTANT, IS_GPU=CONSTANT,
        ),
        constexprs={
            "ROWS": rows, "TURNS": _CONFIG.gemv_turns, "GROUPS": _CONFIG.gemv_groups, "HAS_PARTS": has_parts,
            "STAGES": 1, "WARPS": _CONFIG.gemv_num_warps, "FORM": form, "HAS_BIAS": True, "IS_GPU": True,
        },
        aligned_args=_ALIGNED,
        num_warps=_CONFIG.gemv_num_warps,
        weights_per_program=_CONFIG.gemv_turns * _CONFIG.gemv_num_warps * _CONFIG.gemv_groups * fast_layout.GROUP,
    )
    for rows, has_parts, form in (
        (1, False, PERMUTED), (1, False, PATCHED), (1, True, PERMUTED), (2, False, PERMUTED), (4, False, PERMUTED),
    )
]  # fmt: skip
_DOT_SHAPE = (_CONFIG.dot_rows, _CONFIG.dot_num_warps, 2)
_WARP_SHAPE = (32, 2, 4)  # for the tensor cores of a warp
DOT = [
    CompileSpec(
        name=_name("dot", rows, has_parts, form) + "_warps" * (width == 4),
        fn=fast_matmul_dot._dot_kernel,
        signature=dict(
            desc_ptr="*i64", x_ptr="*bf16", bias_ptr="*bf16", out_ptr="*fp32" if has_parts else "*u16", **_SIZES,
            BN=CONSTANT, BK=CONSTANT, HAS_PARTS=CONSTANT, STAGES=CONSTANT, WARPS=CONSTANT, WIDTH=CONSTANT,
            FORM=CONSTANT, HAS_BIAS=CONSTANT, OPERAND=CONSTANT,
        ),
        constexprs={
            "ROWS": rows, "BN": block, "BK": _CONFIG.dot_cols, "HAS_PARTS": has_parts, "STAGES": _CONFIG.dot_num_stages,
            "WARPS": warps, "WIDTH": width, "FORM": form, "HAS_BIAS": True, "OPERAND": tl.bfloat16,
        },
        aligned_args=_ALIGNED,
        num_warps=warps,
        weights_per_program=block * _CONFIG.dot_cols,
    )
    for rows, has_parts, form, (block, warps, width) in (
        (16, False, PERMUTED, _DOT_SHAPE), (16, False, PATCHED, _DOT_SHAPE), (16, True, PERMUTED, _DOT_SHAPE),
        (32, False, PERMUTED, _DOT_SHAPE), (64, False, PERMUTED, _DOT_SHAPE),
        (8, False, PERMUTED, _WARP_SHAPE), (16, False, PERMUTED, _WARP_SHAPE),
    )
]  # fmt: skip
SUM = [
    CompileSpec(
        name="fast_sum",
        fn=fast_matmul._sum_kernel,
        signature=dict(
            part_ptr="*fp32", bias_ptr="*bf16", out_ptr="*u16", rows="i32", padded="i32", PARTS=CONSTANT,
            AT_ONCE=CONSTANT, HAS_BIAS=CONSTANT,
        ),
        constexprs={"PARTS": fast_matmul.MAX_PARTS, "AT_ONCE": fast_matmul.SUM_ROWS, "HAS_BIAS": True},
        aligned_args=("part_ptr", "bias_ptr", "out_ptr"),
        weights_per_program=fast_matmul.SUM_ROWS * 4096,
    )
]  # fmt: skip
