"""The fused multiplication for at most 4 rows of activations: a dot product per tile, in FP32 multiply-adds.

Two tiles per warp and one lane per thread, as in decoding. A thread multiplies every 8 weights that it decodes by 8
activations of each row; the L1 cache holds the activations.
"""

import triton
import triton.language as tl

from vllm_dfloat.codec import layout
from vllm_dfloat.kernels.packed_matmul_parts import _store_sums, _wrap
from vllm_dfloat.kernels.tiles import (
    LANES,
    STATUS_DESCRIPTOR,
    STEPS,
    TILE_WEIGHTS,
    _exponents_of_eight,
    _four_words,
    _interleave,
    _merge,
    _open,
    _read,
    _section,
    _tile_status,
)

STEP_WEIGHTS = tl.constexpr(layout.STEP_WEIGHTS)


@triton.jit
def _low(pair):
    """Return the first of two BF16 numbers as FP32."""
    return (pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def _high(pair):
    """Return the second of two BF16 numbers as FP32."""
    return (pair & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _dot_of_eight(a, b, c, d, x, column, TILES: tl.constexpr):
    """Return per lane the sum of 8 products, in FP32: weights a..d, two per word, times 8 activations.

    x: pointer to pairs of BF16; column: int32 [TILES, LANES], in units of 8.
    """
    x0, x1, x2, x3 = _four_words(x + (column * 4)[:, :, None], TILES)
    total = _low(a) * _low(x0)
    total += _high(a) * _high(x0)
    total += _low(b) * _low(x1)
    total += _high(b) * _high(x1)
    total += _low(c) * _low(x2)
    total += _high(c) * _high(x2)
    total += _low(d) * _low(x3)
    total += _high(d) * _high(x3)
    return total


@triton.jit
def _dots_of_eight(
    a, b, c, d, x, column, cols, num_x, TILES: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Return the sums of `_dot_of_eight` for ROWS rows of x: [TILES, LANES, ROWS]. Missing rows repeat the last one.

    [TILES, LANES] for one row: Triton 3.6 moves tensors whose last dimension is 1 through shared memory.
    """
    pairs = cols * 4
    last = num_x - 1
    dot0 = _dot_of_eight(a, b, c, d, x, column, TILES)
    if ROWS == 1:
        dots = dot0
    else:
        dot1 = _dot_of_eight(a, b, c, d, x + pairs * tl.minimum(last, 1), column, TILES)
        if ROWS == 2:
            dots = tl.join(dot0, dot1)
        else:
            dot2 = _dot_of_eight(a, b, c, d, x + pairs * tl.minimum(last, 2), column, TILES)
            dot3 = _dot_of_eight(a, b, c, d, x + pairs * tl.minimum(last, 3), column, TILES)
            dots = _interleave(dot0, dot1, dot2, dot3)
    return dots


@triton.jit
def _sum_of_lanes(acc, ROWS: tl.constexpr):
    """Return the sums [TILES, ROWS] over the lanes of each tile."""
    return tl.sum(acc, axis=1, keep_dims=ROWS == 1)


@triton.jit
def _add(acc0, acc1, acc2, acc3, dots, segment, ROWS: tl.constexpr, SEGMENTS: tl.constexpr):
    """Add dots, from `_dots_of_eight`, to the accumulator of each lane's segment, int32 [TILES, LANES]."""
    if SEGMENTS == 1:
        acc0 += dots
    else:
        at = segment if ROWS == 1 else segment[:, :, None]
        # Selected, not multiplied by 0: 0 times infinity is NaN, which must not reach another row.
        acc0 += tl.where(at == 0, dots, 0.0)
        acc1 += tl.where(at == 1, dots, 0.0)
        if SEGMENTS > 2:
            acc2 += tl.where(at == 2, dots, 0.0)
        if SEGMENTS > 3:
            acc3 += tl.where(at == 3, dots, 0.0)
    return acc0, acc1, acc2, acc3


# Sizes are not specialized: a layer of another size must not compile another kernel while requests wait.
@triton.jit(do_not_specialize=["num_tiles", "cols", "num_x", "salt"])
def _gemv_kernel(
    desc_ptr,  # int64[4]                              see kernels/tiles.py
    x_ptr,  # uint32[num_x, cols / 2]               pairs of BF16 activations
    part_ptr,  # float32[num_tiles, SEGMENTS, ROWS]    partial sums
    status_ptr,  # int32[num_tiles]                      0, or a sum of STATUS_* bits
    num_tiles,  # int32
    cols,  # int32                                  a multiple of 8
    num_x,  # int32                                  rows of x, 1 to ROWS
    salt,  # int64                                  of the seal, see vllm_dfloat/codec/descriptor.py
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Multiply TILES tiles per program by up to ROWS (1, 2 or 4) rows of x. Grid (ceil(num_tiles / TILES),)."""
    num_tiles = num_tiles.to(tl.int64)
    tile = (tl.program_id(0).to(tl.int64) * TILES + tl.arange(0, TILES))[:, None]
    tile = tl.minimum(tile, num_tiles - 1)  # to store the same sums twice costs less than masks
    lane = tl.arange(0, LANES)[None, :]
    cols = (
        cols // STEP_WEIGHTS
    )  # columns are counted in eights, so that the compiler sees aligned loads
    start = ((tile * (TILE_WEIGHTS // STEP_WEIGHTS)) % cols).to(tl.int32)
    acc0 = tl.zeros([TILES, LANES] if ROWS == 1 else [TILES, LANES, ROWS], tl.float32)
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0
    is_sound, payload, kind, sizes = _read(desc_ptr, salt)
    if is_sound & (kind == 0):
        lut, shift, plane, words, is_full, end, bit, word0, word1, word2 = _open(
            payload, sizes, tile, num_tiles
        )
        for half in range(STEPS // 2):
            signs = plane[:, :, None] + ((lane + half * LANES) * 4)[:, :, None]
            sm0, sm1, sm2, sm3 = _four_words(signs, TILES)
            for k in tl.static_range(2):
                e0, e1, e2, e3, bit, word0, word1, word2 = _exponents_of_eight(
                    words, bit, word0, word1, word2, lut, shift
                )
                a, b = _merge(sm0 if k == 0 else sm2, e0, e1)
                c, d = _merge(sm1 if k == 0 else sm3, e2, e3)
                group = lane + (half * 2 + k) * LANES
                column, segment = _wrap(start + group, cols, SEGMENTS)
                dots = _dots_of_eight(a, b, c, d, x_ptr, column, cols, num_x, TILES, ROWS)
                acc0, acc1, acc2, acc3 = _add(acc0, acc1, acc2, acc3, dots, segment, ROWS, SEGMENTS)
        tl.store(status_ptr + tile, _tile_status(bit, end, is_full))
    elif is_sound:
        raw = _section(payload, 0, tl.uint32) + (tile * (TILE_WEIGHTS // 2))[:, :, None]
        for half in range(STEPS // 2):
            for k in tl.static_range(2):
                group = lane + (half * 2 + k) * LANES
                a, b, c, d = _four_words(raw + (group * 4)[:, :, None], TILES)
                column, segment = _wrap(start + group, cols, SEGMENTS)
                dots = _dots_of_eight(a, b, c, d, x_ptr, column, cols, num_x, TILES, ROWS)
                acc0, acc1, acc2, acc3 = _add(acc0, acc1, acc2, acc3, dots, segment, ROWS, SEGMENTS)
        tl.store(status_ptr + tile, tl.zeros_like(tile).to(tl.int32))
    else:
        acc0 += float("nan")  # in every row that any of the tiles touches
        acc1 = acc0
        acc2 = acc0
        acc3 = acc0
        tl.store(status_ptr + tile, tl.zeros_like(tile).to(tl.int32) + STATUS_DESCRIPTOR)
    everywhere = tile >= 0
    _store_sums(part_ptr, tile, everywhere, _sum_of_lanes(acc0, ROWS), 0, ROWS, SEGMENTS)
    if SEGMENTS > 1:
        _store_sums(part_ptr, tile, everywhere, _sum_of_lanes(acc1, ROWS), 1, ROWS, SEGMENTS)
    if SEGMENTS > 2:
        _store_sums(part_ptr, tile, everywhere, _sum_of_lanes(acc2, ROWS), 2, ROWS, SEGMENTS)
    if SEGMENTS > 3:
        _store_sums(part_ptr, tile, everywhere, _sum_of_lanes(acc3, ROWS), 3, ROWS, SEGMENTS)
