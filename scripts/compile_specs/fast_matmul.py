"""The kernels that multiply by the fast layout, in the forms for NVIDIA GPUs."""

from dataclasses import replace

import triton
import triton.language as tl
from compile_specs.spec import CONSTANT, CompileSpec

from vllm_dfloat.codec import fast_layout
from vllm_dfloat.kernels import (
    fast_experts_matmul,
    fast_matmul,
    fast_matmul_ahead,
    fast_matmul_bands,
    fast_matmul_dot,
    fast_matmul_gemv,
)
from vllm_dfloat.kernels.configs import CONFIGS, DEFAULT
from vllm_dfloat.kernels.fast_escapes import PATCHED, PERMUTED, PLAIN
from vllm_dfloat.kernels.fast_product import (
    LOW_BANDS,
    MAX_LOW_ROWS,
    MAX_PARTS,
    TALL_BANDS,
    DotShape,
    GemvShape,
)

_GEMV = GemvShape()  # in every table
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
    kinds = {PLAIN: "_plain", PATCHED: "_patched", PERMUTED: ""}
    return f"fast_{form}_{rows}" + "_parts" * has_parts + kinds[kind]


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
            "ROWS": rows, "TURNS": _GEMV.turns, "GROUPS": _GEMV.groups, "HAS_PARTS": has_parts,
            "STAGES": 1, "WARPS": _GEMV.warps, "FORM": form, "HAS_BIAS": True, "IS_GPU": True,
        },
        aligned_args=_ALIGNED,
        num_warps=_GEMV.warps,
        weights_per_program=_GEMV.turns * _GEMV.warps * _GEMV.groups * fast_layout.GROUP,
        has_rare_paths=True,
    )
    for rows, has_parts, form in (
        (1, False, PERMUTED), (1, False, PATCHED), (1, True, PERMUTED), (2, False, PERMUTED), (4, False, PERMUTED),
    )
]  # fmt: skip


def _dot(rows: int, has_parts: bool, form: int, shape: DotShape) -> CompileSpec:
    plain = replace(shape, in_order=False)
    sizes = "" if plain == DotShape() else f"_{shape.rows}x{shape.warps}x{shape.width}"
    return CompileSpec(
        name=_name("in_order" if shape.in_order else "dot", rows, has_parts, form) + sizes,
        fn=fast_matmul_dot._dot_kernel,
        signature=dict(
            desc_ptr="*i64", x_ptr="*bf16", bias_ptr="*bf16", out_ptr="*fp32" if has_parts else "*u16", **_SIZES,
            BN=CONSTANT, BK=CONSTANT, HAS_PARTS=CONSTANT, STAGES=CONSTANT, WARPS=CONSTANT, WIDTH=CONSTANT,
            IN_ORDER=CONSTANT, WAITS=CONSTANT, FORM=CONSTANT, HAS_BIAS=CONSTANT, OPERAND=CONSTANT,
        ),
        constexprs={
            "ROWS": rows, "BN": shape.rows, "BK": shape.cols, "HAS_PARTS": has_parts, "STAGES": shape.stages,
            "WARPS": shape.warps, "WIDTH": shape.width, "IN_ORDER": shape.in_order, "FORM": form,
            "WAITS": shape.warps >= 4 and fast_matmul.must_wait(triton.__version__, (9, 0)), "HAS_BIAS": True,
            "OPERAND": tl.bfloat16,
        },
        aligned_args=_ALIGNED,
        num_warps=shape.warps,
        weights_per_program=shape.rows * shape.cols,
        has_rare_paths=True,
    )  # fmt: skip


def _chosen() -> dict[tuple[int, DotShape], None]:
    """Return what any table chooses of dot: for how many rows of activations it is compiled, and how it is launched."""
    found = {}
    for product in [DEFAULT.fast_product, *(config.fast_product for config in CONFIGS.values())]:
        for num_x in (8, 16, 32, 64):
            for rows in (4096, 28_672):
                choice = product.choice(rows, num_x)
                if choice is not None and choice.shape.stages > 1:  # others are in AHEAD and BANDS
                    assert isinstance(choice.shape, DotShape)
                    found[fast_matmul.compiled_rows(num_x, choice.shape), choice.shape] = None
    return found


DOT = [
    *(_dot(16, False, form, DotShape()) for form in (PLAIN, PATCHED)),
    *(_dot(rows, has_parts, PERMUTED, shape) for rows, shape in _chosen() for has_parts in (False, True)),
]  # fmt: skip
# A candidate for mode "fused-exact" and more than 32 rows of activations.
IN_ORDER = [
    _dot(64, False, PERMUTED, DotShape(in_order=True)),
]
# The first three are in no table yet; the others are what mode "fused-exact" launches for up to 32 rows of activations
# and matrices of fewer rows, the last two for an odd number of tiles side by side.
AHEAD = [
    CompileSpec(
        name=_name("ahead_in_order" if in_order else "ahead", rows, has_parts, PERMUTED)
        + f"_{block}x{warps}" * in_order,
        fn=fast_matmul_ahead._ahead_kernel,
        signature=dict(
            desc_ptr="*i64", x_ptr="*u32", bias_ptr="*bf16", out_ptr="*fp32" if has_parts else "*u16", **_SIZES,
            BN=CONSTANT, WARPS=CONSTANT, HAS_PARTS=CONSTANT, IN_ORDER=CONSTANT, FORM=CONSTANT, HAS_BIAS=CONSTANT,
            OPERAND=CONSTANT,
        ),
        constexprs={
            "ROWS": rows, "BN": block, "WARPS": warps, "HAS_PARTS": has_parts, "IN_ORDER": in_order, "FORM": PERMUTED,
            "HAS_BIAS": True, "OPERAND": tl.bfloat16,
        },
        aligned_args=_ALIGNED,
        num_warps=warps,
        max_registers=fast_matmul.max_registers(DotShape(block, stages=1, warps=warps, width=4), rows),
        on_amd={"WARPS": 1},
        weights_per_program=block * warps * fast_layout.TILE_COLS,
        has_rare_paths=True,
    )
    for rows, block, warps, has_parts, in_order in (
        (8, 16, 1, False, False), (8, 16, 1, True, False), (16, 16, 1, False, False),
        (8, 16, 2, False, True), (16, 16, 2, False, True), (32, 16, 2, False, True),
        (16, 8, 2, False, True), (32, 8, 2, False, True),
        (8, 16, 1, False, True), (16, 8, 1, False, True),
    )
]  # fmt: skip


def bands(rows: int, warps: int) -> DotShape:
    """Return how the kernel with bands is launched for so many rows of activations."""
    shape = LOW_BANDS if rows <= MAX_LOW_ROWS else TALL_BANDS
    return replace(shape, rows=shape.band * warps, warps=warps)


# Candidates for mode "fused"; those of four warps are what mode "fused-exact" launches for matrices of many rows.
BANDS = [
    CompileSpec(
        name=_name("bands", rows, has_parts, PERMUTED) + f"_{warps}" * (warps != 4),
        fn=fast_matmul_bands._bands_kernel,
        signature=dict(
            desc_ptr="*i64", x_ptr="*u32", bias_ptr="*bf16", out_ptr="*fp32" if has_parts else "*u16", **_SIZES,
            WARPS=CONSTANT, HAS_PARTS=CONSTANT, FORM=CONSTANT, HAS_BIAS=CONSTANT, OPERAND=CONSTANT,
        ),
        constexprs={
            "ROWS": rows, "WARPS": warps, "HAS_PARTS": has_parts, "FORM": PERMUTED, "HAS_BIAS": True,
            "OPERAND": tl.bfloat16,
        },
        aligned_args=_ALIGNED,
        num_warps=warps,
        max_registers=fast_matmul.max_registers(bands(rows, warps), rows),
        on_amd={"WARPS": 4},
        weights_per_program=2048 * warps,
        has_rare_paths=True,
    )
    for rows, warps, has_parts in (
        (16, 4, False), (16, 4, True), (32, 4, False), (32, 4, True), (64, 4, False), (64, 4, True), (64, 2, False),
    )
]  # fmt: skip
EXPERTS = [
    CompileSpec(
        name=f"fast_experts_{rows}" + "_unsorted" * (not is_sorted),
        fn=fast_experts_matmul._experts_kernel,
        signature=dict(
            desc_ptr="*i64", x_ptr="*u32", bias_ptr="*bf16", weight_ptr="*fp32", ids_ptr="*i32", padded_ptr="*i32",
            expert_ptr="*i32", out_ptr="*u16", salt="i64", low_bytes="i32", num_experts="i32", rows="i32", cols="i32",
            num_out="i32", block="i32", top_k="i32", ROWS=CONSTANT, IS_SORTED=CONSTANT, HAS_WEIGHTS=CONSTANT,
            HAS_BIAS=CONSTANT, FORM=CONSTANT, OPERAND=CONSTANT,
        ),
        constexprs={
            "ROWS": rows, "IS_SORTED": is_sorted, "HAS_WEIGHTS": True, "HAS_BIAS": True, "FORM": PERMUTED,
            "OPERAND": tl.bfloat16,
        },
        aligned_args=(*_ALIGNED, "weight_ptr", "ids_ptr", "padded_ptr", "expert_ptr"),
        num_warps=1,
        weights_per_program=fast_experts_matmul.BLOCK_ROWS * fast_layout.TILE_COLS,
        has_rare_paths=True,
    )
    for rows, is_sorted in ((8, True), (16, True), (8, False))
]  # fmt: skip
SUM = [
    CompileSpec(
        name="fast_sum",
        fn=fast_matmul._sum_kernel,
        signature=dict(
            part_ptr="*fp32", bias_ptr="*bf16", out_ptr="*u16", rows="i32", padded="i32", PARTS=CONSTANT,
            AT_ONCE=CONSTANT, HAS_BIAS=CONSTANT,
        ),
        constexprs={"PARTS": MAX_PARTS, "AT_ONCE": fast_matmul.SUM_ROWS, "HAS_BIAS": True},
        aligned_args=("part_ptr", "bias_ptr", "out_ptr"),
        weights_per_program=fast_matmul.SUM_ROWS * 4096,
    )
]  # fmt: skip
