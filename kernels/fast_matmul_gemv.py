"""The product with a matrix in the fast layout for at most 4 rows of activations, in FP32 multiply-adds.

A warp has TURNS rows of weights and a thread a group of 16 columns of each, or several; a thread multiplies the
activations of its columns by all its rows. Its sums are added over the warp at the end.
"""

import triton
import triton.language as tl

from vllm_dfloat.codec import fast_layout
from vllm_dfloat.kernels.fast_escapes import PERMUTED, _bounded, _patch, _round, _split_four
from vllm_dfloat.kernels.fast_planes import _eight_weights, _open

_GROUP = tl.constexpr(fast_layout.GROUP)
_TILE_ROWS = tl.constexpr(fast_layout.TILE_ROWS)
_PERMUTED = tl.constexpr(PERMUTED)
_ROW_GROUPS = tl.constexpr(fast_layout.TILE_COLS // fast_layout.GROUP)


@triton.jit
def _load(ptr, offset, mask, IS_GPU: tl.constexpr):
    """Load at `ptr` + `offset` [TURNS, WARPS, GROUPS, words]; 0 where the mask is false.

    The claims of contiguity are not true; they only sort the axes, as in fast_matmul_dot.py.
    """
    ptr += offset
    if IS_GPU:
        return tl.load(tl.max_contiguous(ptr, [1, 2, 4, 8]), mask=mask, other=0)
    else:
        return tl.load(ptr, mask=mask, other=0)


@triton.jit
def _first(pair):
    """Return the first of two BF16 numbers as FP32."""
    return (pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def _second(pair):
    """Return the second of two BF16 numbers as FP32."""
    return (pair & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _add_pair(acc, w, x):
    acc += _first(w) * _first(x)
    acc += _second(w) * _second(x)
    return acc


@triton.jit
def _add_group(acc, a, b, c, d, e, f, g, h, x, words, offset, mask, IS_GPU: tl.constexpr):
    """Add the products of each group with a row of x, uint32 pairs, to acc [TURNS, WARPS, GROUPS]."""
    x0, x1, x2, x3 = _split_four(_load(x + words, offset, mask, IS_GPU))
    x4, x5, x6, x7 = _split_four(_load(x + words + 4, offset, mask, IS_GPU))
    acc = _add_pair(acc, a, x0)
    acc = _add_pair(acc, b, x1)
    acc = _add_pair(acc, c, x2)
    acc = _add_pair(acc, d, x3)
    acc = _add_pair(acc, e, x4)
    acc = _add_pair(acc, f, x5)
    acc = _add_pair(acc, g, x6)
    return _add_pair(acc, h, x7)


@triton.jit
def _store(
    acc, m: tl.constexpr, part, row, rows, num_x, out_ptr, bias_ptr,
    ROWS: tl.constexpr, HAS_PARTS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Add over the groups and store the sums of row `m` of x."""
    total = tl.sum(acc, axis=2)
    mask = (row < rows) & (tl.zeros_like(row) + m < num_x)
    if HAS_PARTS:
        tl.store(out_ptr + (part * ROWS + m) * rows + row, total, mask=mask)
    else:
        if HAS_BIAS:
            total += tl.load(bias_ptr + row, mask=row < rows, other=0.0).to(tl.float32)
        tl.store(out_ptr + m * rows + row, _round(total), mask=mask)


@triton.jit(do_not_specialize=["salt", "low_bytes", "rows", "num_x"])
def _gemv_kernel(
    desc_ptr,  # int64[4], see codec/descriptor.py; num_entries and base as sizes
    x_ptr,  # uint32[num_x, cols / 2], pairs of BF16
    bias_ptr,  # bfloat16 or float32[rows], not read unless HAS_BIAS
    out_ptr,  # uint16[num_x, rows], BF16 bits; float32[parts, ROWS, rows] if HAS_PARTS
    salt,  # int64, of the seal
    low_bytes,  # int32, 0x00FF00FF, see fast_planes.py
    rows,  # int32
    cols,  # int32, a multiple of 128
    num_x,  # int32, 1 to ROWS
    ROWS: tl.constexpr,  # 1, 2 or 4
    TURNS: tl.constexpr,  # rows of weights per warp; TURNS * WARPS divides 64
    GROUPS: tl.constexpr,  # groups of a row at a time, a multiple of 32
    HAS_PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    WARPS: tl.constexpr,
    FORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_GPU: tl.constexpr,
):
    """Grid (ceil(rows / TURNS / WARPS), parts)."""
    pack: tl.constexpr = 4 if TURNS % 4 == 0 and GROUPS == 32 else 1
    prmt: tl.constexpr = FORM == _PERMUTED
    low_bytes = low_bytes.to(tl.uint32)
    is_sound, low, high, starts_ptr, entries_ptr, base4, num_entries = _open(
        desc_ptr, salt, rows, cols
    )
    part = tl.program_id(1)
    first = tl.program_id(0) * (TURNS * WARPS)
    row = first + tl.arange(0, TURNS)[:, None] * WARPS + tl.arange(0, WARPS)[None, :]
    held = tl.minimum(row, rows - 1)[:, :, None]
    lane = tl.arange(0, GROUPS)[None, None, :]
    row_groups = cols // _GROUP
    at = held.to(tl.int64) * row_groups + lane
    low = (
        low.to(tl.pointer_type(tl.uint32))
        + (at * 4)[:, :, :, None]
        + tl.arange(0, 4)[None, None, None, :]
    )
    high += (at * 2)[:, :, :, None] + tl.arange(0, 2)[None, None, None, :]
    words = (tl.zeros([1, WARPS, 1], tl.int32) + lane * 8)[:, :, :, None]
    words += tl.arange(0, 4)[None, None, None, :]
    # All rows of a program lie in one row of tiles.
    starts = (first // _TILE_ROWS) * (row_groups // _ROW_GROUPS) + tl.zeros([1, WARPS, 1], tl.int32)
    in_tile = (held % _TILE_ROWS) * _ROW_GROUPS + lane % _ROW_GROUPS
    steps = tl.cdiv(row_groups, GROUPS)
    per_part = tl.cdiv(steps, tl.num_programs(1))
    begin = part * per_part
    end = tl.where(is_sound, tl.minimum(begin + per_part, steps), begin)
    # Without a sound descriptor nothing is added to NaN.
    acc0 = tl.zeros([TURNS, WARPS, GROUPS], tl.float32) + tl.where(is_sound, 0.0, float("nan"))
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0
    last = num_x - 1
    for step in tl.range(begin, end, num_stages=STAGES):
        group = step * GROUPS + lane
        exists = (group < row_groups)[:, :, :, None]
        low0, low1, low2, low3 = _split_four(_load(low, step * (GROUPS * 4), exists, IS_GPU))
        codes0, codes1 = tl.split(_load(high, step * (GROUPS * 2), exists, IS_GPU))
        a, b, c, d = _eight_weights(low0, low1, codes0, base4, low_bytes, prmt)
        e, f, g, h = _eight_weights(low2, low3, codes1, base4, low_bytes, prmt)
        tile = (starts + group // _ROW_GROUPS)[:, :, :, None]
        entry = tl.sum(_load(starts_ptr, tile, exists, IS_GPU), axis=3)
        stop = tl.sum(_load(starts_ptr + 1, tile, exists, IS_GPU), axis=3)
        entry, stop = _bounded(entry, stop, num_entries)
        a, b, c, d, e, f, g, h = _patch(
            a, b, c, d, e, f, g, h, in_tile, entry, stop, entries_ptr, FORM, pack
        )
        offset = step * (GROUPS * 8)
        acc0 = _add_group(acc0, a, b, c, d, e, f, g, h, x_ptr, words, offset, exists, IS_GPU)
        if ROWS > 1:
            x1 = x_ptr + tl.minimum(1, last) * (cols // 2)
            acc1 = _add_group(acc1, a, b, c, d, e, f, g, h, x1, words, offset, exists, IS_GPU)
        if ROWS > 2:
            x2 = x_ptr + tl.minimum(2, last) * (cols // 2)
            x3 = x_ptr + tl.minimum(3, last) * (cols // 2)
            acc2 = _add_group(acc2, a, b, c, d, e, f, g, h, x2, words, offset, exists, IS_GPU)
            acc3 = _add_group(acc3, a, b, c, d, e, f, g, h, x3, words, offset, exists, IS_GPU)
    _store(acc0, 0, part, row, rows, num_x, out_ptr, bias_ptr, ROWS, HAS_PARTS, HAS_BIAS)
    if ROWS > 1:
        _store(acc1, 1, part, row, rows, num_x, out_ptr, bias_ptr, ROWS, HAS_PARTS, HAS_BIAS)
    if ROWS > 2:
        _store(acc2, 2, part, row, rows, num_x, out_ptr, bias_ptr, ROWS, HAS_PARTS, HAS_BIAS)
        _store(acc3, 3, part, row, rows, num_x, out_ptr, bias_ptr, ROWS, HAS_PARTS, HAS_BIAS)
