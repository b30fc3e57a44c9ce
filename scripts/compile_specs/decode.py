"""The kernels that decode: whole matrices, groups of them and chosen rows of the packed layout, and official units."""

from compile_specs.spec import CONSTANT, CompileSpec

from vllm_dfloat.codec import layout
from vllm_dfloat.kernels import (
    dfloat11_decode,
    dfloat11_resident,
    expert_decode,
    expert_marks,
    group_decode,
    packed_decode,
    packed_rows,
)
from vllm_dfloat.kernels.configs import DEFAULT, ROWS_TILES_PER_PROGRAM
from vllm_dfloat.kernels.tiles import num_warps

TYPICAL_BLOCK_WEIGHTS = 12_400  # at 2.64 bits per code

_TILES = DEFAULT.decode_tiles_per_program
_ROWS_TILES = ROWS_TILES_PER_PROGRAM
_WHOLE = dict(
    constexprs={"TILES": _TILES},
    num_warps=num_warps(_TILES),
    weights_per_program=_TILES * layout.TILE_WEIGHTS,
    loop_runs=layout.STEPS // 2,
)
_OFFICIAL = dict(num_warps=DEFAULT.dfloat11_num_warps, weights_per_program=TYPICAL_BLOCK_WEIGHTS)

PACKED = [
    CompileSpec(
        name="decode",
        fn=packed_decode._decode_kernel,
        signature=dict(
            desc_ptr="*i64", out_ptr="*u32", status_ptr="*i32", num_tiles="i32", salt="i64", TILES=CONSTANT
        ),
        aligned_args=("desc_ptr", "out_ptr", "status_ptr"),
        **_WHOLE,
    ),
    CompileSpec(
        name="decode_run",
        fn=packed_decode._decode_run_kernel,
        signature=dict(
            desc_ptr="*i64", out_ptr="*u32", status_ptr="*i32", num_tiles="i32", first="i32", count="i32", salt="i64",
            TILES=CONSTANT,
        ),
        aligned_args=("desc_ptr", "out_ptr", "status_ptr"),
        **_WHOLE,
    ),
    CompileSpec(
        name="decode_group",
        fn=group_decode._decode_group_kernel,
        signature=dict(
            table_ptr="*i64", out_ptr="*u32", status_ptr="*i32", num_members="i32", num_tiles="i32", salt="i64",
            TILES=CONSTANT,
        ),
        aligned_args=("table_ptr", "out_ptr", "status_ptr"),
        **_WHOLE,
    ),
]  # fmt: skip
EXPERTS = [
    *(
        CompileSpec(
            name=name,
            fn=expert_decode._decode_chosen_kernel,
            signature=dict(
                desc_ptr="*i64", chosen_ptr="*i32", out_ptr="*u32", status_ptr="*i32", num_experts="i32",
                expert_numel="i32", num_tiles="i32", salt="i64", TILES=CONSTANT, EXPERTS=CONSTANT,
            ),
            aligned_args=("desc_ptr", "chosen_ptr", "out_ptr", "status_ptr"),
            counts_outer_loops=False,  # a turn of a program
            **{**_WHOLE, "constexprs": {"TILES": _TILES, "EXPERTS": experts}},
        )
        for name, experts in (("decode_chosen", 128), ("decode_chosen_512", 512))
    ),
    *(
        CompileSpec(
            name=name,
            fn=expert_marks._mark_kernel,
            signature=dict(
                ids_ptr=ids_type, map_ptr="*i32", chosen_ptr="*i32", num_ids="i32", num_global="i32",
                num_experts="i32", HAS_MAP=CONSTANT, CLEARS=CONSTANT, AT_ONCE=CONSTANT,
            ),
            constexprs={"HAS_MAP": has_map, "CLEARS": clears, "AT_ONCE": expert_marks.IDS_AT_ONCE},
            aligned_args=("ids_ptr", "map_ptr", "chosen_ptr"),
            num_warps=expert_marks.NUM_WARPS,
            weights_per_program=expert_marks.IDS_AT_ONCE,  # ids
        )
        for name, ids_type, has_map, clears in (
            ("mark_chosen", "*i32", False, True),
            ("mark_chosen_map", "*i64", True, True),
            ("mark_chosen_many", "*i32", True, False),
        )
    ),
]  # fmt: skip
ROWS = [
    CompileSpec(
        name=name,
        fn=packed_rows._decode_rows_kernel,
        signature=dict(
            desc_ptr="*i64",
            ids_ptr="*i32",  # vLLM passes 32-bit ids on a GPU
            out_ptr="*u16", status_ptr=status_type, rows="i32", cols="i32", parts="i32", salt="i64", TILES=CONSTANT,
        ),
        constexprs={"TILES": _ROWS_TILES, **absent},
        aligned_args=("desc_ptr", "ids_ptr", "out_ptr"),
        num_warps=num_warps(_ROWS_TILES),
        weights_per_program=_ROWS_TILES * layout.TILE_WEIGHTS,
        loop_runs=layout.STEPS,
    )
    for name, status_type, absent in (
        ("decode_rows", CONSTANT, {"status_ptr": None}),
        ("decode_rows_status", "*i32", {}),
    )
]  # fmt: skip
OFFICIAL = [
    CompileSpec(
        name="decode_dfloat11",
        fn=dfloat11_decode._decode_dfloat11_kernel,
        signature=dict(
            stream_ptr="*u8", sign_mantissa_ptr="*u8", tables_ptr="*i32", positions_ptr="*i64", gaps_ptr="*u8",
            out_ptr="*i16", status_ptr="*i32",
            num_bytes="i32", num_weights="i32", num_blocks="i32", num_rows="i32",
        ),
        aligned_args=("stream_ptr", "sign_mantissa_ptr", "tables_ptr", "out_ptr"),
        **_OFFICIAL,
    ),
    CompileSpec(
        name="decode_dfloat11_resident",
        fn=dfloat11_resident._decode_resident_kernel,
        signature=dict(desc_ptr="*i64", out_ptr="*i16", status_ptr="*i32", num_weights="i32", salt="i64"),
        aligned_args=("desc_ptr", "out_ptr", "status_ptr"),
        **_OFFICIAL,
    ),
    CompileSpec(
        name="decode_dfloat11_run",
        fn=dfloat11_resident._decode_resident_run_kernel,
        signature=dict(
            desc_ptr="*i64", out_ptr="*i16", num_weights="i32", first="i32", end="i32", salt="i64"
        ),
        aligned_args=("desc_ptr", "out_ptr"),
        **_OFFICIAL,
    ),
    CompileSpec(
        name="decode_dfloat11_rows",
        fn=dfloat11_resident._decode_resident_rows_kernel,
        signature=dict(
            desc_ptr="*i64", ids_ptr="*i32", out_ptr="*i16", rows="i32", cols="i32", parts="i32", salt="i64"
        ),
        aligned_args=("desc_ptr", "ids_ptr", "out_ptr"),
        **_OFFICIAL,
    ),
]  # fmt: skip
