"""The product with a matrix in the fast layout on tensor cores, for up to 64 rows of activations.

A program multiplies BN rows of weights by all columns, or by one of several equal parts of them, BK at a time. Weights
are the left operand. Tensor cores want 4 neighbouring threads to hold 2 or 4 neighbouring columns each, but a thread
has a whole group of 16; so columns are taken in another order, in which its group is what a thread must hold. The rows
of activations are put in the same order, and no weight changes its thread.
"""

import triton
import triton.language as tl

from vllm_dfloat.codec import fast_layout
from vllm_dfloat.kernels.fast_escapes import PERMUTED, _bounded, _patch, _round, _split_four
from vllm_dfloat.kernels.fast_planes import _eight_weights, _open

_GROUP = tl.constexpr(fast_layout.GROUP)
_TILE_COLS = tl.constexpr(fast_layout.TILE_COLS)
_TILE_ROWS = tl.constexpr(fast_layout.TILE_ROWS)
_QUAD = tl.constexpr(4)  # threads that share a row
_PERMUTED = tl.constexpr(PERMUTED)
_ROW_GROUPS = tl.constexpr(fast_layout.TILE_COLS // fast_layout.GROUP)


@triton.jit
def _words(ptr, offset, IS_GPU: tl.constexpr, ONCE: tl.constexpr = False):
    """Load a tile of words [blocks, rows, 4 groups, words of a group] at pointers `ptr` + `offset`.

    The claims of contiguity are not true. They only sort the axes: Triton gives neighbouring groups to neighbouring
    threads, then neighbouring rows, so that nothing must be exchanged between threads later.

    ONCE: nothing else reads these words, which shall not take the place of activations in a cache.
    """
    ptr += offset
    if IS_GPU:
        ptr = tl.max_contiguous(ptr, [1, 2, 4, 8])
    return tl.load(ptr, eviction_policy="evict_first" if ONCE else "")


@triton.jit
def _operand(
    a, b, c, d, e, f, g, h, BN: tl.constexpr, BK: tl.constexpr, WARPS: tl.constexpr, WIDTH: tl.constexpr,
    IN_ORDER: tl.constexpr = False,
):  # fmt: skip
    """Return the words of each group, [BK / 64, BN, 4], as BF16 [BN, BK], rows and columns in the order of the product.

    Weight (step, half, one of two) of a thread's group is column (block, step, half, thread, one of two) for the tensor
    cores of a warp group. For those of a warp, where Triton takes 4 columns of a thread together (WIDTH), it is column
    (block, step, thread, half, one of two).

    IN_ORDER: a step takes the 16 columns of a group, the first 8 as its first half. With 4 columns of a thread together
    these are columns (two steps, half, thread, step, one of two), since Triton takes 32 columns for two steps.
    """
    left = tl.join(tl.join(a, e), tl.join(c, g))
    right = tl.join(tl.join(b, f), tl.join(d, h))
    words = tl.join(left, right)  # [block, row, thread, step / 2, step % 2, half]
    pairs = tl.join(words & 0xFFFF, words >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    # A warp's rows are 8 neighbouring ones, and 8 more for every further turn of all warps.
    if IN_ORDER:
        # (two steps, step, half, 4 threads, one of two)
        pairs = tl.reshape(pairs, [BK // 64, BN // (16 * WARPS), 2, WARPS, 8, 2, 2, 2, 4, 2])
        if WIDTH == 2:
            pairs = tl.permute(pairs, (1, 3, 2, 4, 0, 5, 6, 7, 8, 9))
        else:
            pairs = tl.permute(pairs, (1, 3, 2, 4, 0, 5, 7, 8, 6, 9))
    else:
        pairs = tl.reshape(pairs, [BK // 64, BN // (16 * WARPS), 2, WARPS, 8, 4, 2, 2, 2, 2])
        if WIDTH == 2:
            pairs = tl.permute(pairs, (1, 3, 2, 4, 0, 6, 7, 8, 5, 9))
        else:
            pairs = tl.permute(pairs, (1, 3, 2, 4, 0, 6, 7, 5, 8, 9))
    return tl.reshape(pairs, [BN, BK])


@triton.jit
def _activations(
    x, BK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, IN_ORDER: tl.constexpr
):
    """Return x [ROWS, BK] as [BK, ROWS], columns in the order of `_operand`."""
    if IN_ORDER:
        if WIDTH == 4:
            x = tl.reshape(x, [ROWS, BK // 32, 2, 2, 4, 2])
            x = tl.reshape(tl.permute(x, (0, 1, 3, 4, 2, 5)), [ROWS, BK])
        return tl.trans(x)
    x = tl.reshape(x, [ROWS, BK // 64, 4, 4, 2, 2])
    x = tl.permute(x, (1, 3, 4, 2, 5, 0) if WIDTH == 2 else (1, 3, 2, 4, 5, 0))
    return tl.reshape(x, [BK, ROWS])


@triton.jit
def _as(x, OPERAND: tl.constexpr):
    """Return BF16 as OPERAND; by hand, because the interpreter changes subnormal numbers."""
    if OPERAND == tl.float32:  # noqa: SIM300  (a constexpr must be left of a dtype)
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x


@triton.jit
def _store_sums(
    acc, out_ptr, bias_ptr, row, m, part, rows, num_x, padded, HAS_PARTS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Store sums, FP32, of rows `row` of the matrix and rows `m` of x, which are broadcast to the shape of acc.

    padded: rows of x for which a part has sums.
    """
    exists = (row < rows) & (m < num_x)
    if HAS_PARTS:
        tl.store(out_ptr + (part * padded + m).to(tl.int64) * rows + row, acc, mask=exists)
    else:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + row, mask=row < rows, other=0.0).to(tl.float32)
        tl.store(out_ptr + m.to(tl.int64) * rows + row, _round(acc), mask=exists)


@triton.jit(do_not_specialize=["salt", "low_bytes", "rows", "num_x"])
def _dot_kernel(
    desc_ptr,  # int64[4], see codec/descriptor.py; num_entries and base as sizes
    x_ptr,  # bfloat16[num_x, cols]
    bias_ptr,  # bfloat16 or float32[rows], not read unless HAS_BIAS
    out_ptr,  # uint16[num_x, rows], BF16 bits; float32[parts, ROWS, rows] if HAS_PARTS
    salt,  # int64, of the seal
    low_bytes,  # int32, 0x00FF00FF, see fast_planes.py
    rows,  # int32
    cols,  # int32, a multiple of BK
    num_x,  # int32, 1 to ROWS
    ROWS: tl.constexpr,
    BN: tl.constexpr,  # 32, 64 or 128
    BK: tl.constexpr,  # 128 or 256
    HAS_PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    WARPS: tl.constexpr,
    WIDTH: tl.constexpr,  # 2 or 4 neighbouring columns in a thread, see `_operand`
    IN_ORDER: tl.constexpr,  # each step of the tensor cores takes the next 16 columns
    WAITS: tl.constexpr,  # a turn ends with a wait for its product, see `must_wait` of fast_matmul.py
    FORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OPERAND: tl.constexpr,  # bfloat16; float32 in the interpreter, which cannot multiply BF16
):
    """Grid (ceil(rows / BN), parts)."""
    is_sound, low, high, starts_ptr, entries_ptr, base4, num_entries = _open(
        desc_ptr, salt, rows, cols
    )
    first = tl.program_id(0) * BN
    part = tl.program_id(1)
    prmt: tl.constexpr = FORM == _PERMUTED
    low_bytes = low_bytes.to(tl.uint32)
    is_gpu: tl.constexpr = OPERAND != tl.float32  # noqa: SIM300  (a constexpr must be left of a dtype)
    block = tl.arange(0, BK // 64)[:, None, None]
    row = tl.arange(0, BN)[None, :, None]
    group = block * _QUAD + tl.arange(0, _QUAD)[None, None, :]  # [block, 1, 4], of the row
    # Rows beyond the last are the last once more; they are not stored.
    held = tl.minimum(first + row, rows - 1).to(tl.int64) * (cols // _GROUP)
    at = held + group
    low = (
        low.to(tl.pointer_type(tl.uint32))
        + (at * 4)[:, :, :, None]
        + tl.arange(0, 4)[None, None, None, :]
    )
    high += (at * 2)[:, :, :, None] + tl.arange(0, 2)[None, None, None, :]
    m = tl.arange(0, ROWS)[:, None]
    x = x_ptr + m * cols + tl.arange(0, BK)[None, :]
    tile_cols = cols // _TILE_COLS
    steps = cols // BK
    per_part = tl.cdiv(steps, tl.num_programs(1))
    begin = part * per_part
    end = tl.where(is_sound, tl.minimum(begin + per_part, steps), begin)
    # Without a sound descriptor nothing is added to NaN.
    acc = tl.zeros([BN, ROWS], tl.float32) + tl.where(is_sound, 0.0, float("nan"))
    for step in tl.range(begin, end, num_stages=STAGES):
        low_words = _words(low, step * (BK // 4), is_gpu)
        codes = _words(high, step * (BK // 8), is_gpu)
        xs = tl.load(x + step * BK, mask=m < num_x, other=0.0)
        low0, low1, low2, low3 = _split_four(low_words)
        codes0, codes1 = tl.split(codes)
        a, b, c, d = _eight_weights(low0, low1, codes0, base4, low_bytes, prmt)
        e, f, g, h = _eight_weights(low2, low3, codes1, base4, low_bytes, prmt)
        for i in tl.static_range((BN + _TILE_ROWS - 1) // _TILE_ROWS):
            for j in tl.static_range(BK // _TILE_COLS):
                tile_row = first // _TILE_ROWS + i
                starts = starts_ptr + tile_row * tile_cols + step * (BK // _TILE_COLS) + j
                exists = tile_row * _TILE_ROWS < rows
                entry = tl.load(starts, mask=exists, other=0)
                stop = tl.load(starts + 1, mask=exists, other=0)
                entry, stop = _bounded(entry, stop, num_entries)
                if stop > entry:
                    column = group - j * _ROW_GROUPS
                    inside = (column >= 0) & (column < _ROW_GROUPS)
                    number = (first % _TILE_ROWS + row - i * _TILE_ROWS) * _ROW_GROUPS + column
                    number = tl.where(inside, number, -1)
                    a, b, c, d, e, f, g, h = _patch(
                        a, b, c, d, e, f, g, h, number, entry, stop, entries_ptr, FORM, 4
                    )
        weights = _operand(a, b, c, d, e, f, g, h, BN, BK, WARPS, WIDTH, IN_ORDER)
        xs = _activations(xs, BK, ROWS, WIDTH, IN_ORDER)
        acc = tl.dot(_as(weights, OPERAND), _as(xs, OPERAND), acc)
        if WAITS:  # what reads the sums can only do so when they are there
            acc = tl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=r,r", [acc], dtype=tl.float32, is_pure=True, pack=1
            )
    n = tl.arange(0, BN)[:, None]
    turn = n // (16 * WARPS) * 2 + n // 8 % 2
    out_row = first + (turn * WARPS + n // 16 % WARPS) * 8 + n % 8
    m = tl.arange(0, ROWS)[None, :]
    _store_sums(acc, out_ptr, bias_ptr, out_row, m, part, rows, num_x, ROWS, HAS_PARTS, HAS_BIAS)
