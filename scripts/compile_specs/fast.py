"""The kernels that decode the fast layout."""

from dataclasses import replace

from compile_specs.spec import CONSTANT, CompileSpec

from vllm_dfloat.codec.fast_layout import GROUP, TILE_COLS, TILE_ROWS
from vllm_dfloat.kernels import fast_decode, fast_experts, fast_group, fast_rows
from vllm_dfloat.kernels.configs import DEFAULT, FAST_ROWS_NUM_WARPS, FAST_ROWS_TILES_PER_PROGRAM

_ROWS, _TILES = DEFAULT.fast_rows_per_program, DEFAULT.fast_tiles_per_program
_CONSTANTS = dict(
    ROWS=_ROWS, STEP=DEFAULT.fast_rows_at_once, TILES=_TILES, AT_ONCE=DEFAULT.fast_weights_at_once
)  # fmt: skip

_RUN = dict(first="i32", count="i32")

WHOLE = [
    CompileSpec(
        name=name,
        fn=fn,
        signature=dict(
            desc_ptr="*i64", out_ptr="*u16", status_ptr="*i32", rows="i32", cols="i32", **run, salt="i64",
            low_bytes="i32",
            ROWS=CONSTANT, STEP=CONSTANT, TILES=CONSTANT, AT_ONCE=CONSTANT, COLS_FACTOR=CONSTANT, WHOLE=CONSTANT,
            PRMT=CONSTANT,
        ),
        constexprs=_CONSTANTS | dict(COLS_FACTOR=factor, WHOLE=whole, PRMT=prmt),
        aligned_args=("desc_ptr", "out_ptr", "status_ptr"),
        num_warps=DEFAULT.fast_num_warps,
        weights_per_program=_ROWS * _TILES * TILE_COLS,
        has_rare_paths=whole,
    )
    for fn, run, name, factor, whole, prmt in (
        (fast_decode._fast_decode_kernel, {}, "fast_decode", 16, True, True),
        (fast_decode._fast_decode_kernel, {}, "fast_decode_plain", 16, True, False),
        (fast_decode._fast_decode_kernel, {}, "fast_decode_partial", 16, False, True),
        (fast_decode._fast_decode_kernel, {}, "fast_decode_8", 8, False, True),
        (fast_decode._fast_decode_kernel, {}, "fast_decode_1", 1, False, True),
        (fast_decode._fast_decode_run_kernel, _RUN, "fast_decode_run", 16, True, True),
        (fast_decode._fast_decode_run_kernel, _RUN, "fast_decode_run_8", 8, False, True),
        (fast_decode._fast_decode_run_kernel, _RUN, "fast_decode_run_1", 1, False, True),
    )
]  # fmt: skip
# Fewer instructions than what is launched, and slower on an H100: for the report.
LEAN = [
    replace(
        spec,
        name=spec.name.replace("fast_decode", "fast_decode_64x16"),
        constexprs=spec.constexprs | dict(ROWS=TILE_ROWS, AT_ONCE=GROUP),
        weights_per_program=TILE_ROWS * _TILES * TILE_COLS,
    )
    for spec in WHOLE[:2]
]
EXPERTS = [
    CompileSpec(
        name=name,
        fn=fast_experts._fast_chosen_kernel,
        signature=dict(
            desc_ptr="*i64", chosen_ptr="*i32", out_ptr="*u16", status_ptr="*i32", num_experts="i32",
            expert_rows="i32", cols="i32", salt="i64", low_bytes="i32",
            ROWS=CONSTANT, STEP=CONSTANT, TILES=CONSTANT, AT_ONCE=CONSTANT, COLS_FACTOR=CONSTANT, WHOLE=CONSTANT,
            PRMT=CONSTANT, EXPERTS=CONSTANT,
        ),
        constexprs=_CONSTANTS | dict(COLS_FACTOR=16, WHOLE=whole, PRMT=True, EXPERTS=experts),
        aligned_args=("desc_ptr", "chosen_ptr", "out_ptr", "status_ptr"),
        num_warps=DEFAULT.fast_num_warps,
        weights_per_program=_ROWS * _TILES * TILE_COLS,
        counts_outer_loops=False,  # a turn of a program
        has_rare_paths=whole,
    )
    for name, experts, whole in (
        ("fast_chosen", 128, True), ("fast_chosen_512", 512, True), ("fast_chosen_partial", 128, False)
    )
]  # fmt: skip
GROUPS = [
    CompileSpec(
        name=name,
        fn=fast_group._fast_group_kernel,
        signature=dict(
            table_ptr="*i64", out_ptr="*u16", status_ptr="*i32", num_members="i32", num_tiles="i32", salt="i64",
            base_salt="i64", low_bytes="i32",
            ROWS=CONSTANT, STEP=CONSTANT, TILES=CONSTANT, AT_ONCE=CONSTANT, COLS_FACTOR=CONSTANT, WHOLE=CONSTANT,
            PRMT=CONSTANT,
        ),
        constexprs=_CONSTANTS | dict(COLS_FACTOR=factor, WHOLE=whole, PRMT=prmt),
        aligned_args=("table_ptr", "out_ptr", "status_ptr"),
        num_warps=DEFAULT.fast_num_warps,
        weights_per_program=_ROWS * _TILES * TILE_COLS,
    )
    for name, factor, whole, prmt in (
        ("fast_group", 16, True, True),
        ("fast_group_plain", 16, True, False),
        ("fast_group_partial", 16, False, True),
        ("fast_group_8", 8, False, True),
        ("fast_group_1", 1, False, True),
    )
]  # fmt: skip
ROWS = [
    CompileSpec(
        name=name,
        fn=fast_rows._fast_rows_kernel,
        signature=dict(
            desc_ptr="*i64", ids_ptr="*i32", out_ptr="*u16", rows="i32", cols="i32", salt="i64", low_bytes="i32",
            TILES=CONSTANT, COLS_FACTOR=CONSTANT, PRMT=CONSTANT,
        ),
        constexprs=dict(TILES=FAST_ROWS_TILES_PER_PROGRAM, COLS_FACTOR=factor, PRMT=True),
        aligned_args=("desc_ptr", "ids_ptr", "out_ptr"),
        num_warps=FAST_ROWS_NUM_WARPS,
        weights_per_program=FAST_ROWS_TILES_PER_PROGRAM * TILE_COLS,
    )
    for name, factor in (("fast_rows", 16), ("fast_rows_1", 1))
]  # fmt: skip
