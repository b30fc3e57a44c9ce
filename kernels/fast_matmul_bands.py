"""The product with the fast layout for matrices of many rows, loaded ahead, in the order of the columns.

A program has a band of 16 or 32 rows of weights for each of its warps. The activations of a turn are loaded once for
all bands, into shared memory, so that reading them takes no longer than reading the weights. A warp's weights go
through shared memory too, 16 bytes at a time, and from there to the tensor cores of the warp, not to those of a warp
group: so each step takes the next 16 columns, and no fence waits for what is loaded ahead. More rows of activations
than a kernel is compiled for are taken by several programs, each of which decodes the weights.
"""

import triton
import triton.language as tl

from vllm_dfloat.codec import fast_layout
from vllm_dfloat.kernels.fast_escapes import PERMUTED, _bounded, _split_four
from vllm_dfloat.kernels.fast_lane_escapes import _fetch, _patch_by_lane
from vllm_dfloat.kernels.fast_matmul_dot import _as, _store_sums, _words
from vllm_dfloat.kernels.fast_matmul_in_order import _of_groups, _start, _weights_of_groups
from vllm_dfloat.kernels.fast_planes import _eight_weights, _open
from vllm_dfloat.kernels.fast_product import LOW_BAND, MAX_AT_ONCE, MAX_LOW_ROWS, TALL_BAND

_GROUP = tl.constexpr(fast_layout.GROUP)
_TILE_COLS = tl.constexpr(fast_layout.TILE_COLS)
_TILE_ROWS = tl.constexpr(fast_layout.TILE_ROWS)
_PERMUTED = tl.constexpr(PERMUTED)
_ROW_GROUPS = tl.constexpr(fast_layout.TILE_COLS // fast_layout.GROUP)
_TURN_WEIGHTS = tl.constexpr(2048)  # of a warp
_LOW_BAND = tl.constexpr(LOW_BAND)
_TALL_BAND = tl.constexpr(TALL_BAND)
_MAX_LOW_ROWS = tl.constexpr(MAX_LOW_ROWS)
_MAX_AT_ONCE = tl.constexpr(MAX_AT_ONCE)


@triton.jit
def _quarters(words, WARPS: tl.constexpr):
    """Split words [(quarter, warp), row, group] into those of each quarter, [warp, row, group]."""
    words = tl.reshape(words, [2, 2, WARPS, 8, 4])
    first, last = tl.split(tl.permute(words, (1, 2, 3, 4, 0)))
    a, b = tl.split(tl.permute(first, (1, 2, 3, 0)))
    c, d = tl.split(tl.permute(last, (1, 2, 3, 0)))
    return a, b, c, d


@triton.jit
def _bands(a, b, c, d, e, f, g, h, WARPS: tl.constexpr, BAND: tl.constexpr):
    """Return the words of each group, [(quarter, warp), row, group], as BF16 [WARPS, BAND, columns].

    The quarters of a thread are put together last. Else Triton has rows, not columns, side by side in shared memory,
    where 4 stores then meet in the same banks.
    """
    EIGHTS: tl.constexpr = BAND // 8
    BLOCKS: tl.constexpr = 4 // EIGHTS
    a0, a1, a2, a3 = _quarters(a, WARPS)
    b0, b1, b2, b3 = _quarters(b, WARPS)
    c0, c1, c2, c3 = _quarters(c, WARPS)
    d0, d1, d2, d3 = _quarters(d, WARPS)
    e0, e1, e2, e3 = _quarters(e, WARPS)
    f0, f1, f2, f3 = _quarters(f, WARPS)
    g0, g1, g2, g3 = _quarters(g, WARPS)
    h0, h1, h2, h3 = _quarters(h, WARPS)
    shape: tl.constexpr = [WARPS, 1, 8, 1, 4, 16]
    first = tl.reshape(_weights_of_groups(a0, b0, c0, d0, e0, f0, g0, h0), shape)
    second = tl.reshape(_weights_of_groups(a1, b1, c1, d1, e1, f1, g1, h1), shape)
    third = tl.reshape(_weights_of_groups(a2, b2, c2, d2, e2, f2, g2, h2), shape)
    fourth = tl.reshape(_weights_of_groups(a3, b3, c3, d3, e3, f3, g3, h3), shape)
    quarter = tl.arange(0, EIGHTS)[None, :, None, None, None, None] * BLOCKS
    quarter += tl.arange(0, BLOCKS)[None, None, None, :, None, None]
    weights = tl.where(
        quarter < 2, tl.where(quarter == 0, first, second), tl.where(quarter == 2, third, fourth)
    )
    return tl.reshape(weights, [WARPS, BAND, BLOCKS * 64])


@triton.jit
def _add(acc, weights, x, OPERAND: tl.constexpr):
    """Add the products of weights, BF16 [WARPS, BAND, columns], with activations to acc, FP32 [WARPS, BAND, ROWS].

    x: pointers [1, columns, ROWS]; so Triton has one copy of them in shared memory for all warps.
    """
    shape: tl.constexpr = [acc.shape[0], weights.shape[2], acc.shape[2]]
    xs = tl.broadcast_to(_as(tl.load(x), OPERAND), shape)
    return tl.dot(_as(weights, OPERAND), xs, acc)


@triton.jit
def _load_turn(low, high, turn, TURN: tl.constexpr, is_gpu: tl.constexpr):
    """Load the words of a turn, TURN columns, from both planes."""
    return (
        _words(low, turn * (TURN // 4), is_gpu, True),
        _words(high, turn * (TURN // 8), is_gpu, True),
    )


@triton.jit
def _sum_bands(
    acc, low, high, starts_ptr, entries_ptr, base4, num_entries, low_bytes, first, rows, x_ptr, m, cols, begin, end,
    FORM: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Add to acc, FP32 [WARPS, BAND, ROWS], the products of the rows from row `first` on with rows `m` of x.

    low, high, starts_ptr, entries_ptr, base4, num_entries: from `_open`.
    first: a multiple of BAND * WARPS; int32. begin, end: tiles, side by side, whose columns are taken; int32.
    """
    WARPS: tl.constexpr = acc.shape[0]
    BAND: tl.constexpr = acc.shape[1]
    TURN: tl.constexpr = _TURN_WEIGHTS // BAND
    TURNS: tl.constexpr = _TILE_COLS // TURN  # of a tile
    BLOCKS: tl.constexpr = TURN // 64
    prmt: tl.constexpr = FORM == _PERMUTED
    is_gpu: tl.constexpr = OPERAND != tl.float32  # noqa: SIM300  (a constexpr must be left of a dtype)
    # Groups are [(8 rows of a band, block of 64 columns, warp), row, group of a block]; the first two are a quarter.
    index = tl.arange(0, 4 * WARPS)[:, None, None]
    row = index % WARPS * BAND + index // (BLOCKS * WARPS) * 8 + tl.arange(0, 8)[None, :, None]
    row += first
    group = index // WARPS % BLOCKS * 4 + tl.arange(0, 4)[None, None, :]  # of a row of the turn
    in_tile = row % _TILE_ROWS * _ROW_GROUPS + group
    # Rows beyond the last are the last once more; they are not stored.
    at = tl.minimum(row, rows - 1).to(tl.int64) * (cols // _GROUP) + group
    low = low.to(tl.pointer_type(tl.uint32)) + (at * 4)[:, :, :, None]
    low += tl.arange(0, 4)[None, None, None, :]
    high += (at * 2)[:, :, :, None] + tl.arange(0, 2)[None, None, None, :]
    steps = cols // _TILE_COLS
    lane = tl.arange(0, 8)[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    # What is added is 0, but gives the tiles of a turn all axes, which `_start` sorts.
    tile = first + tl.arange(0, WARPS)[:, None, None] * BAND + (lane >> 5)
    tile = tl.minimum(tile, rows - 1) // _TILE_ROWS * steps
    x = x_ptr.to(tl.pointer_type(tl.bfloat16)) + m[None, None, :] * cols
    x += tl.arange(0, TURN)[None, :, None]
    if begin < end:
        low_words, codes = _load_turn(low, high, begin * TURNS, TURN, is_gpu)
        entry = _start(starts_ptr, tile + begin, is_gpu)
        stop = _start(starts_ptr, tile + begin + 1, is_gpu)
        # The end of the next turn's tiles, as loaded; for a second turn in the same tile it is the same.
        beyond = _start(starts_ptr, tile + tl.minimum(begin + 1 + 1 // TURNS, steps), is_gpu)
        entry, stop = _bounded(entry, stop, num_entries)
        fetched = _fetch(entry, stop, entries_ptr, FORM)
        for turn in tl.range(begin * TURNS, end * TURNS, num_stages=1):
            place = turn - turn // TURNS * TURNS  # in its tile
            low0, low1, low2, low3 = _split_four(low_words)
            codes0, codes1 = tl.split(codes)
            a, b, c, d = _eight_weights(low0, low1, codes0, base4, low_bytes, prmt)
            e, f, g, h = _eight_weights(low2, low3, codes1, base4, low_bytes, prmt)
            # What the last turn loads ahead is not used. As in fast_matmul_ahead.py, where to load from depends on what
            # the turn before has loaded, by a bit that is 0.
            bit = (fetched.to(tl.uint32) >> 31) & (beyond >> 31)
            ahead = tl.minimum(turn + 1 + bit.to(tl.int32), end * TURNS - 1)
            ahead = _of_groups(ahead, 4)[:, :, :, None]
            low_words, codes = _load_turn(low, high, ahead, TURN, is_gpu)
            a, b, c, d, e, f, g, h = _patch_by_lane(
                a, b, c, d, e, f, g, h, in_tile + place * 4, _of_groups(entry, 4), _of_groups(stop, 4),
                _of_groups(fetched, 4), entries_ptr, BAND, FORM,
            )  # fmt: skip
            entry = tl.where(place + 1 == TURNS, stop, entry).to(tl.uint32)
            entry, stop = _bounded(entry, beyond, num_entries)
            fetched = _fetch(entry, stop, entries_ptr, FORM)
            after = (turn + 2) // TURNS + 1
            beyond = _start(starts_ptr, tile + tl.minimum(after, steps), is_gpu)
            weights = _bands(a, b, c, d, e, f, g, h, WARPS, BAND)
            acc = _add(acc, weights, x + turn * TURN, OPERAND)
    return acc


@triton.jit(do_not_specialize=["salt", "low_bytes", "rows", "num_x"])
def _bands_kernel(
    desc_ptr,  # int64[4], see codec/descriptor.py; num_entries and base as sizes
    x_ptr,  # uint32[num_x, cols / 2], pairs of BF16
    bias_ptr,  # bfloat16 or float32[rows], not read unless HAS_BIAS
    out_ptr,  # uint16[num_x, rows], BF16 bits; float32[parts, num_x padded to ROWS, rows] if HAS_PARTS
    salt,  # int64, of the seal
    low_bytes,  # int32, 0x00FF00FF, see fast_planes.py
    rows,  # int32
    cols,  # int32, a multiple of 128
    num_x,  # int32, 1 to ROWS, or any number if ROWS is MAX_AT_ONCE
    ROWS: tl.constexpr,  # of x per program
    WARPS: tl.constexpr,  # a power of two
    HAS_PARTS: tl.constexpr,
    FORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OPERAND: tl.constexpr,  # bfloat16; float32 in the interpreter, which cannot multiply BF16
):
    """Grid (ceil(rows / (BAND * WARPS)) * ceil(num_x / ROWS), parts); programs of the same rows lie side by side."""
    is_sound, low, high, starts_ptr, entries_ptr, base4, num_entries = _open(
        desc_ptr, salt, rows, cols
    )
    BAND: tl.constexpr = _LOW_BAND if ROWS <= _MAX_LOW_ROWS else _TALL_BAND
    blocks = tl.cdiv(num_x, ROWS) if ROWS == _MAX_AT_ONCE else 1
    first = tl.program_id(0) // blocks * (BAND * WARPS)
    first_x = tl.program_id(0) % blocks * ROWS
    part = tl.program_id(1)
    m = tl.minimum(first_x + tl.arange(0, ROWS), num_x - 1)
    steps = cols // _TILE_COLS
    per_part = tl.cdiv(steps, tl.num_programs(1))
    begin = part * per_part
    end = tl.where(is_sound, tl.minimum(begin + per_part, steps), begin)
    # Without a sound descriptor nothing is added to NaN.
    acc = tl.zeros([WARPS, BAND, ROWS], tl.float32) + tl.where(is_sound, 0.0, float("nan"))
    acc = _sum_bands(
        acc, low, high, starts_ptr, entries_ptr, base4, num_entries, low_bytes.to(tl.uint32),
        first, rows, x_ptr, m, cols, begin, end, FORM, OPERAND,
    )  # fmt: skip
    n = tl.arange(0, WARPS)[:, None, None] * BAND + tl.arange(0, BAND)[None, :, None]
    m = first_x + tl.arange(0, ROWS)[None, None, :]
    padded = blocks * ROWS
    _store_sums(
        acc, out_ptr, bias_ptr, first + n, m, part, rows, num_x, padded, HAS_PARTS, HAS_BIAS
    )
