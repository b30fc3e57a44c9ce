"""The kernels that encode, into both layouts."""

from compile_specs.spec import CONSTANT, CompileSpec

from vllm_dfloat.codec import fast_layout, layout
from vllm_dfloat.kernels import dfloat11_encode, encode_count, fast_encode, packed_encode
from vllm_dfloat.kernels.configs import DEFAULT
from vllm_dfloat.kernels.tiles import num_warps

_BY_WINDOW = encode_count.BY_WINDOW
_COUNTED = DEFAULT.count_window_tiles_per_program if _BY_WINDOW else DEFAULT.count_tiles_per_program
_TILES = DEFAULT.encode_tiles_per_program
_PACKED = dict(
    constexprs={"TILES": _TILES},
    num_warps=num_warps(_TILES),
    weights_per_program=_TILES * layout.TILE_WEIGHTS,
)
_TABLE = dict(weights_ptr="*u32", table_ptr="*u32", lane_lengths_ptr="*u8")
_SIZES = dict(first_tile="i32", num_tiles="i32", TILES=CONSTANT)
_OFFICIAL_TILES = DEFAULT.dfloat11_encode_tiles_per_program
_OFFICIAL_WEIGHTS = _OFFICIAL_TILES * layout.LANES * dfloat11_encode.LANE_WEIGHTS
_OFFICIAL_SIZES = dict(num_weights="i32", num_lanes="i32")
_WARPS = DEFAULT.dfloat11_encode_num_warps
_MEASURED = dict(entries_ptr="*i32")
_WRITTEN = dict(low_ptr="*u32", high_ptr="*u32", starts_ptr="*u32", entries_ptr="*u32")

COUNT = [
    CompileSpec(
        name="encode_count",
        fn=encode_count._count_kernel,
        signature=dict(
            weights_ptr="*u32", counts_ptr="*i64", num_tiles="i32", TILES=CONSTANT, BY_WINDOW=CONSTANT
        ),
        constexprs={"TILES": _COUNTED, "BY_WINDOW": _BY_WINDOW},
        aligned_args=("weights_ptr", "counts_ptr"),
        num_warps=DEFAULT.count_num_warps,
        weights_per_program=_COUNTED * layout.TILE_WEIGHTS,
        loop_runs=_COUNTED,
    )
]  # fmt: skip
PACKED = [
    CompileSpec(
        name="encode_measure",
        fn=packed_encode._measure_kernel,
        signature={**_TABLE, "tile_words_ptr": "*i32", **_SIZES},
        aligned_args=(*_TABLE, "tile_words_ptr"),
        loop_runs=layout.STEPS,
        **_PACKED,
    ),
    CompileSpec(
        name="encode_write",
        fn=packed_encode._write_kernel,
        signature={
            **_TABLE, "tile_starts_ptr": "*i32", "sign_mantissa_ptr": "*u32", "words_ptr": "*u32", **_SIZES,
        },
        aligned_args=(*_TABLE, "tile_starts_ptr", "sign_mantissa_ptr", "words_ptr"),
        loop_runs=layout.STEPS // 2,
        **_PACKED,
    ),
]  # fmt: skip
FAST = [
    CompileSpec(
        name=name,
        fn=fn,
        signature=dict(
            weights_ptr="*u16", **sections, rows="i32", cols="i32", half_base="i32", STEP=CONSTANT, COLS_FACTOR=CONSTANT
        ),
        constexprs={"STEP": DEFAULT.fast_encode_rows, "COLS_FACTOR": factor},
        aligned_args=("weights_ptr", *(each for each in sections if each != "entries_ptr")),
        weights_per_program=fast_layout.TILE_WEIGHTS,
        loop_runs=fast_layout.TILE_ROWS // DEFAULT.fast_encode_rows,
    )
    for name, fn, sections, factor in (
        ("fast_measure", fast_encode._measure_kernel, _MEASURED, 8),
        ("fast_measure_1", fast_encode._measure_kernel, _MEASURED, 1),
        ("fast_write", fast_encode._write_kernel, _WRITTEN, 8),
        ("fast_write_1", fast_encode._write_kernel, _WRITTEN, 1),
    )
]  # fmt: skip
OFFICIAL = [
    CompileSpec(
        name="encode_dfloat11_measure",
        fn=dfloat11_encode._measure_kernel,
        signature=dict(
            weights_ptr="*u32", lengths_ptr="*u8", lane_bits_ptr="*i32", **_OFFICIAL_SIZES, LANES_AT_ONCE=CONSTANT
        ),
        constexprs={"LANES_AT_ONCE": _OFFICIAL_TILES * layout.LANES},
        aligned_args=("weights_ptr", "lengths_ptr", "lane_bits_ptr"),
        num_warps=_WARPS,
        weights_per_program=_OFFICIAL_WEIGHTS,
    ),
    CompileSpec(
        name="encode_dfloat11_write",
        fn=dfloat11_encode._write_kernel,
        signature=dict(
            weights_ptr="*u32", codes_ptr="*u32", lengths_ptr="*u8", starts_ptr="*i64", words_ptr="*u32",
            first_bits_ptr="*u8", begins_ptr="*i64", **_OFFICIAL_SIZES, TILES=CONSTANT,
        ),
        constexprs={"TILES": _OFFICIAL_TILES},
        aligned_args=("weights_ptr", "codes_ptr", "lengths_ptr", "starts_ptr", "words_ptr"),
        num_warps=_WARPS,
        weights_per_program=_OFFICIAL_WEIGHTS,
        loop_runs=dfloat11_encode.LANE_WEIGHTS // 8,
    ),
    CompileSpec(
        name="encode_dfloat11_split",
        fn=dfloat11_encode._split_kernel,
        signature=dict(weights_ptr="*i16", out_ptr="*u8", num_weights="i32", AT_ONCE=CONSTANT),
        constexprs={"AT_ONCE": DEFAULT.dfloat11_split_weights},
        aligned_args=("weights_ptr", "out_ptr"),
        num_warps=_WARPS,
        weights_per_program=DEFAULT.dfloat11_split_weights,
    ),
]  # fmt: skip
