"""The product with the fast layout on the tensor cores of a warp, without shared memory: for a few rows of activations.

A program is one warp with BN rows of weights. As in fast_matmul_dot.py the columns are put in an order in which each
thread already holds what its tensor core wants of it; here this is so for the activations too. So nothing is exchanged
between threads, no thread waits for another, and the loads of a turn are made one turn ahead, into registers.
"""

import triton
import triton.language as tl

from vllm_dfloat.codec import fast_layout
from vllm_dfloat.kernels.fast_escapes import PERMUTED, _bounded, _patch, _round, _split_four
from vllm_dfloat.kernels.fast_matmul_dot import _operand, _words
from vllm_dfloat.kernels.fast_planes import _eight_weights, _open

_GROUP = tl.constexpr(fast_layout.GROUP)
_TILE_COLS = tl.constexpr(fast_layout.TILE_COLS)
_TILE_ROWS = tl.constexpr(fast_layout.TILE_ROWS)
_PERMUTED = tl.constexpr(PERMUTED)
_ROW_GROUPS = tl.constexpr(fast_layout.TILE_COLS // fast_layout.GROUP)
_BLOCKS = tl.constexpr(fast_layout.TILE_COLS // 64)


@triton.jit
def _turn(low, high, starts, step, IS_GPU: tl.constexpr):
    """Load what turn `step` needs: bytes, nibbles, the bounds of the tile's entries."""
    return (
        _words(low, step * 32, IS_GPU),
        _words(high, step * 16, IS_GPU),
        tl.load(starts + step),
        tl.load(starts + step + 1),
    )


@triton.jit
def _activations(left, right, ROWS: tl.constexpr):
    """Return halves of each group, [blocks, ROWS, 4, 4] pairs, as BF16 [128, ROWS], columns in `_operand`'s order."""
    words = tl.join(left, right)  # [block, row, thread, (step % 2, half), step / 2]
    pairs = tl.join(words & 0xFFFF, words >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    pairs = tl.reshape(pairs, [_BLOCKS, ROWS, 4, 2, 2, 2, 2])
    pairs = tl.permute(pairs, (0, 5, 3, 2, 4, 6, 1))
    return tl.reshape(pairs, [_BLOCKS * 64, ROWS])


@triton.jit(do_not_specialize=["salt", "low_bytes", "rows", "num_x"])
def _ahead_kernel(
    desc_ptr,  # int64[4], see codec/descriptor.py; num_entries and base as sizes
    x_ptr,  # uint32[num_x, cols / 2], pairs of BF16
    bias_ptr,  # bfloat16 or float32[rows], not read unless HAS_BIAS
    out_ptr,  # uint16[num_x, rows], BF16 bits; float32[parts, ROWS, rows] if HAS_PARTS
    salt,  # int64, of the seal
    low_bytes,  # int32, 0x00FF00FF, see fast_planes.py
    rows,  # int32
    cols,  # int32, a multiple of 128
    num_x,  # int32, 1 to ROWS
    ROWS: tl.constexpr,
    BN: tl.constexpr,  # 16, 32 or 64
    HAS_PARTS: tl.constexpr,
    FORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OPERAND: tl.constexpr,  # bfloat16; float32 in the interpreter, which cannot multiply BF16
):
    """Grid (ceil(rows / BN), parts); one warp."""
    is_sound, low, high, starts_ptr, entries_ptr, base4, num_entries = _open(
        desc_ptr, salt, rows, cols
    )
    first = tl.program_id(0) * BN
    part = tl.program_id(1)
    prmt: tl.constexpr = FORM == _PERMUTED
    low_bytes = low_bytes.to(tl.uint32)
    is_gpu: tl.constexpr = OPERAND != tl.float32  # noqa: SIM300  (a constexpr must be left of a dtype)
    row = tl.arange(0, BN)[None, :, None]
    group = tl.arange(0, _BLOCKS)[:, None, None] * 4 + tl.arange(0, 4)[None, None, :]
    # Rows beyond the last are the last once more; they are not stored.
    at = tl.minimum(first + row, rows - 1).to(tl.int64) * (cols // _GROUP) + group
    word = tl.arange(0, 4)[None, None, None, :]
    low = low.to(tl.pointer_type(tl.uint32)) + (at * 4)[:, :, :, None] + word
    high += (at * 2)[:, :, :, None] + tl.arange(0, 2)[None, None, None, :]
    m = tl.minimum(tl.arange(0, ROWS), num_x - 1)[None, :, None]
    x = x_ptr + (m * (cols // 2) + group * 8)[:, :, :, None] + word
    steps = cols // _TILE_COLS
    starts = starts_ptr + first // _TILE_ROWS * steps
    in_tile = (first % _TILE_ROWS + row) * _ROW_GROUPS + group
    per_part = tl.cdiv(steps, tl.num_programs(1))
    begin = part * per_part
    end = tl.where(is_sound, tl.minimum(begin + per_part, steps), begin)
    # Without a sound descriptor nothing is added to NaN.
    acc = tl.zeros([BN, ROWS], tl.float32) + tl.where(is_sound, 0.0, float("nan"))
    if begin < end:
        low_words, codes, entry, stop = _turn(low, high, starts, begin, is_gpu)
        for step in tl.range(begin, end, num_stages=1):
            # The last turn loads its own words once more, which are not used.
            following = _turn(low, high, starts, tl.minimum(step + 1, end - 1), is_gpu)
            # Mostly in the L1 or L2 cache; they arrive while weights are decoded.
            left = _words(x, step * 64, is_gpu)
            right = _words(x, step * 64 + 4, is_gpu)
            low0, low1, low2, low3 = _split_four(low_words)
            codes0, codes1 = tl.split(codes)
            a, b, c, d = _eight_weights(low0, low1, codes0, base4, low_bytes, prmt)
            e, f, g, h = _eight_weights(low2, low3, codes1, base4, low_bytes, prmt)
            entry, stop = _bounded(entry, stop, num_entries)
            if stop > entry:
                a, b, c, d, e, f, g, h = _patch(
                    a, b, c, d, e, f, g, h, in_tile, entry, stop, entries_ptr, FORM, 4
                )
            weights = _operand(a, b, c, d, e, f, g, h, BN, _TILE_COLS, 1, 4).to(OPERAND)
            acc = tl.dot(weights, _activations(left, right, ROWS).to(OPERAND), acc)
            low_words, codes, entry, stop = following
    n = tl.arange(0, BN)[:, None]
    out_row = first + n
    m = tl.arange(0, ROWS)[None, :]
    if HAS_PARTS:
        out = out_ptr + (part * ROWS + m).to(tl.int64) * rows + out_row
        tl.store(out, acc, mask=(out_row < rows) & (m < num_x))
    else:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + out_row, mask=out_row < rows, other=0.0).to(tl.float32)
        out = out_ptr + m.to(tl.int64) * rows + out_row
        tl.store(out, _round(acc), mask=(out_row < rows) & (m < num_x))
