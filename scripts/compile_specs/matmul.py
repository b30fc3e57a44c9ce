"""The fused kernels, which multiply by packed weights."""

from compile_specs.spec import CONSTANT, CompileSpec

from vllm_dfloat.codec import layout
from vllm_dfloat.kernels import packed_matmul, packed_matmul_gemv
from vllm_dfloat.kernels.configs import DEFAULT, SUM_ROWS
from vllm_dfloat.kernels.tiles import num_warps

_GEMV_TILES = DEFAULT.fused_gemv_tiles_per_program
_FORM = dict(TILES=CONSTANT, ROWS=CONSTANT, SEGMENTS=CONSTANT)


def _name(form: str, rows: int, segments: int) -> str:
    return f"{form}_{rows}" + ("" if segments == 1 else f"_segments_{segments}")


GEMV = [
    CompileSpec(
        name=_name("gemv", rows, segments),
        fn=packed_matmul_gemv._gemv_kernel,
        signature=dict(
            desc_ptr="*i64", x_ptr="*u32", part_ptr="*fp32", status_ptr="*i32", num_tiles="i32", cols="i32",
            num_x="i32", salt="i64", **_FORM,
        ),
        constexprs={"TILES": _GEMV_TILES, "ROWS": rows, "SEGMENTS": segments},
        aligned_args=("desc_ptr", "x_ptr", "part_ptr", "status_ptr"),
        num_warps=num_warps(_GEMV_TILES),
        weights_per_program=_GEMV_TILES * layout.TILE_WEIGHTS,
        loop_runs=layout.STEPS // 2,
    )
    for rows, segments in ((1, 1), (2, 1), (4, 1), (1, 2), (4, 2))
]  # fmt: skip
SUM = [
    CompileSpec(
        name=f"sum_{rows}",
        fn=packed_matmul._sum_kernel,
        signature=dict(
            part_ptr="*fp32", bias_ptr="*bf16", out_ptr="*u16", rows="i32", cols="i32", num_x="i32",
            ROWS=CONSTANT, SEGMENTS=CONSTANT, SUM_ROWS=CONSTANT, HAS_BIAS=CONSTANT,
        ),
        constexprs={"ROWS": rows, "SEGMENTS": 1, "SUM_ROWS": SUM_ROWS, "HAS_BIAS": True},
        aligned_args=("part_ptr", "bias_ptr", "out_ptr"),
        weights_per_program=SUM_ROWS * 4096,
    )
    for rows in (1, 4)
]  # fmt: skip
