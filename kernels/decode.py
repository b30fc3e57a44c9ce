"""Decode the packed layout to BF16: the whole matrix, or chosen rows of it.

One program decodes a few tiles, one tile a warp, one lane a thread. A thread finds its lane's first bit by a scan over
the 32 lane lengths of its tile, then decodes 64 weights: peek at 32 bits, look up the next codes, merge two exponents
with two signs and mantissas at once, and store 16 bytes for every 8 weights. There is no counting pass; the one barrier
is that of the status word.

The kernels take a descriptor instead of the payload itself, so that nothing whose size depends on the weights reaches a
traced graph, and a captured CUDA graph sees new weights after a reload:

    desc  int64[4]  address of the payload, kind (0 packed, 1 raw), number of words, code_bits

Whatever the bytes say, every loop has a constant bound and no read leaves the payload: a lane starts at or before the
last word that is not padding, and reads at most `PAD_WORDS` from there.
"""

import torch
import triton
import triton.language as tl

from vllm_dfloat.codec import layout
from vllm_dfloat.kernels.compile_spec import CompileSpec

LANES = tl.constexpr(layout.LANES)
STEPS = tl.constexpr(layout.STEPS)
TILE_WEIGHTS = tl.constexpr(layout.TILE_WEIGHTS)
LANE_LENGTH_UNIT = tl.constexpr(layout.LANE_LENGTH_UNIT)
LENGTH_MASK = tl.constexpr(layout.LENGTH_MASK)
PAD_WORDS = tl.constexpr(layout.PAD_WORDS)
SIGN_MANTISSA_MASK = tl.constexpr(layout.SIGN_MANTISSA_MASK)
EXPONENT_MASK = tl.constexpr(layout.SIGN_MANTISSA_MASK ^ 0xFFFFFFFF)
MAX_TILE_WORDS = tl.constexpr(layout.LANES * 255 * layout.LANE_LENGTH_UNIT // 32)

STATUS_LANE_END = tl.constexpr(1)
STATUS_TILE_END = tl.constexpr(2)

TILES_PER_PROGRAM = 4


@triton.jit
def _section(payload, offset, dtype: tl.constexpr):
    """Return a pointer to a section of the payload; payload and sections start on multiples of 16 bytes."""
    base = tl.multiple_of(payload.to(tl.pointer_type(tl.uint8)), 16)
    return (base + offset).to(tl.pointer_type(dtype))


@triton.jit
def _exponents_of_eight(words, bit, lut, CODE_BITS: tl.constexpr):
    """Decode the next 8 weights of each lane; return 4 pairs of LUT entries and the bit after them.

    words: pointers to each lane's tile; bit: int32, position from there; lut: uint16[1 << CODE_BITS].
    """
    CODES_PER_WINDOW: tl.constexpr = 32 // CODE_BITS
    window = tl.zeros_like(bit).to(tl.uint32)
    first = window
    pair0 = window
    pair1 = window
    pair2 = window
    pair3 = window
    for j in tl.static_range(8):
        if j % CODES_PER_WINDOW == 0:
            word = words + (bit >> 5)
            shift = (bit & 31).to(tl.uint32)
            # The form of the second shift lets the compiler see one funnel shift, also for shift 0.
            window = (tl.load(word) << shift) | ((tl.load(word + 1) >> 1) >> (31 - shift))
        entry = tl.load(lut + (window >> (32 - CODE_BITS))).to(tl.uint32)
        length = entry & LENGTH_MASK
        window = window << length
        bit += length.to(tl.int32)
        if j % 2 == 0:
            first = entry
        else:
            pair = first | (entry << 16)
            if j == 1:
                pair0 = pair
            elif j == 3:
                pair1 = pair
            elif j == 5:
                pair2 = pair
            else:
                pair3 = pair
    return pair0, pair1, pair2, pair3, bit


@triton.jit
def _merge(sign_mantissa, low_pair, high_pair):
    """Return the BF16 bits of 4 weights as two words: one bit-select each, the second after a rotation by 8."""
    turned = (sign_mantissa >> 8) | (sign_mantissa << 24)
    low = (sign_mantissa & SIGN_MANTISSA_MASK) | (low_pair & EXPONENT_MASK)
    high = (turned & SIGN_MANTISSA_MASK) | (high_pair & EXPONENT_MASK)
    return low, high


@triton.jit
def _interleave(a, b, c, d):
    """Return [..., 4] with a, b, c, d along the last axis, held by the thread that held them."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), a.shape + [4])  # noqa: RUF005 (Triton has no starred lists)


@triton.jit
def _lane_starts(payload, tile, num_tiles, num_words, CODE_BITS: tl.constexpr):
    """Return per lane: pointer to its tile's words, first and last bit from there; and per tile whether it is full.

    tile: int64 [TILES, 1]. Starts are clamped to the words that are not padding.
    """
    lengths_offset = (2 << CODE_BITS) + num_tiles * TILE_WEIGHTS
    starts_offset = lengths_offset + num_tiles * LANES
    words_offset = starts_offset + (4 * (num_tiles + 1) + 15) // 16 * 16
    lane = tl.arange(0, LANES)[None, :]
    lengths = _section(payload, lengths_offset, tl.uint8)
    length = tl.load(lengths + (tile * LANES + lane)).to(tl.int32) * LANE_LENGTH_UNIT
    end = tl.cumsum(length, axis=1)
    starts = _section(payload, starts_offset, tl.uint32)
    limit = num_words - PAD_WORDS
    begin_word = tl.minimum(tl.load(starts + tile).to(tl.int64), limit)
    end_word = tl.minimum(tl.load(starts + tile + 1).to(tl.int64), limit)
    room = tl.minimum(limit - begin_word, MAX_TILE_WORDS).to(tl.int32)
    start = tl.minimum(end - length, room * 32)
    tile_bits = tl.sum(length, axis=1, keep_dims=True)
    is_full = (tile_bits + 31) // 32 == (end_word - begin_word)
    words = _section(payload, words_offset, tl.uint32) + begin_word
    return words, start, end, is_full


@triton.jit
def _tile_status(bit, end, is_full):
    """Return the status of tiles [TILES, 1] from the last and expected last bits of their lanes [TILES, LANES]."""
    used = (bit + (LANE_LENGTH_UNIT - 1)) // LANE_LENGTH_UNIT * LANE_LENGTH_UNIT
    wrong = tl.max((used != end).to(tl.int32), axis=1, keep_dims=True) * STATUS_LANE_END
    return wrong + (1 - is_full.to(tl.int32)) * STATUS_TILE_END


@triton.jit
def _decode_tiles(
    desc_ptr, tile, num_tiles, out_ptr, status_ptr, CODE_BITS: tl.constexpr, TILES: tl.constexpr
):
    """Decode tiles int64 [TILES, 1] of one matrix, one a warp; the pointers are those of `_decode_kernel`."""
    payload = tl.load(desc_ptr)
    num_words = tl.load(desc_ptr + 2)
    lane = tl.arange(0, LANES)[None, :]
    quad = tl.arange(0, 4)[None, None, :]
    out_base = out_ptr + (tile * (TILE_WEIGHTS // 2))[:, :, None]
    if tl.load(desc_ptr + 1) != 0:
        raw = _section(payload, 0, tl.uint32) + (tile * (TILE_WEIGHTS // 2))[:, :, None]
        for step in tl.static_range(STEPS):
            offset = ((lane + step * LANES) * 4)[:, :, None] + quad
            tl.store(out_base + offset, tl.load(raw + offset))
        tl.store(status_ptr + tile, tl.zeros_like(tile).to(tl.int32))
    else:
        words, bit, end, is_full = _lane_starts(payload, tile, num_tiles, num_words, CODE_BITS)
        lut = _section(payload, 0, tl.uint16)
        plane = _section(payload, 2 << CODE_BITS, tl.uint32)
        plane += (tile * (TILE_WEIGHTS // 4))[:, :, None]
        for half in tl.static_range(STEPS // 2):
            four = tl.load(plane + ((lane + half * LANES) * 4)[:, :, None] + quad)
            even, odd = tl.split(tl.reshape(four, [TILES, LANES, 2, 2]))
            sm0, sm2 = tl.split(even)
            sm1, sm3 = tl.split(odd)
            for k in tl.static_range(2):
                e0, e1, e2, e3, bit = _exponents_of_eight(words, bit, lut, CODE_BITS)
                if k == 0:
                    a, b = _merge(sm0, e0, e1)
                    c, d = _merge(sm1, e2, e3)
                else:
                    a, b = _merge(sm2, e0, e1)
                    c, d = _merge(sm3, e2, e3)
                offset = ((lane + (half * 2 + k) * LANES) * 4)[:, :, None] + quad
                tl.store(out_base + offset, _interleave(a, b, c, d))
        tl.store(status_ptr + tile, _tile_status(bit, end, is_full))


# Sizes are not specialized: a layer of another size must not compile another kernel while requests wait.
@triton.jit(do_not_specialize=["num_tiles"])
def _decode_kernel(
    desc_ptr,  # int64[4]                        see above
    out_ptr,  # uint32[num_tiles * 1024]        pairs of BF16, whole tiles
    status_ptr,  # int32[num_tiles]                0, or a sum of STATUS_* bits
    num_tiles,  # int32
    CODE_BITS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Decode TILES tiles per program to BF16.

    Equal bit for bit to `vllm_dfloat.codec.reference.decode`. Grid (ceil(num_tiles / TILES),).
    Reads about 10.8 bits and writes 16 per weight. A program past the end repeats the last tile: the same bits
    written twice cost less than a mask on every store.
    """
    num_tiles = num_tiles.to(tl.int64)  # times 2048 it passes 2**31
    tile = (tl.program_id(0).to(tl.int64) * TILES + tl.arange(0, TILES))[:, None]
    tile = tl.minimum(tile, num_tiles - 1)
    _decode_tiles(desc_ptr, tile, num_tiles, out_ptr, status_ptr, CODE_BITS, TILES)


@triton.jit(do_not_specialize=["rows", "cols"])
def _decode_rows_kernel(
    desc_ptr,  # int64[4]                        see above
    ids_ptr,  # int64[num_ids]                  rows asked for
    out_ptr,  # uint16[num_ids, cols]           BF16 bits
    status_ptr,  # int32[num_ids, tiles a row can touch]    0, or a sum of STATUS_* bits; or None
    rows,  # int32
    cols,  # int32
    CODE_BITS: tl.constexpr,
):
    """Decode one tile that one chosen row touches, and store the part of it that is the row's.

    Equal bit for bit to those rows of `vllm_dfloat.codec.reference.decode`. Grid (num_ids, tiles a row can touch).
    An id outside the matrix reads the nearest row: vLLM masks such ids out afterwards.
    """
    payload = tl.load(desc_ptr)
    num_words = tl.load(desc_ptr + 2)
    num_tiles = (rows.to(tl.int64) * cols + TILE_WEIGHTS - 1) // TILE_WEIGHTS
    row = tl.load(ids_ptr + tl.program_id(0)).to(tl.int64)  # times cols it can pass 2**31
    row = tl.minimum(tl.maximum(row, 0), rows - 1)
    first = row * cols
    nearest = first // TILE_WEIGHTS + tl.program_id(1)
    status = tl.zeros([1, 1], tl.int32)
    if nearest * TILE_WEIGHTS < first + cols:
        tile = nearest + tl.zeros([1, 1], tl.int64)
        lane = tl.arange(0, LANES)[None, :]
        pair = tl.arange(0, 4)[None, None, :]
        half = tl.arange(0, 2)[None, None, None, :]
        # Where weight 0 of the tile would lie in the output; parts outside the row are masked.
        shift = tl.program_id(0).to(tl.int64) * cols - first
        if tl.load(desc_ptr + 1) != 0:
            for step in tl.static_range(STEPS):
                word = ((lane + step * LANES) * 4)[:, :, None] + pair
                weight = (tile * TILE_WEIGHTS)[:, :, None, None] + word[:, :, :, None] * 2 + half
                mask = (weight >= first) & (weight < first + cols)
                value = tl.load(_section(payload, 0, tl.uint16) + weight, mask=mask, other=0)
                tl.store(out_ptr + shift + weight, value, mask=mask)
        else:
            words, bit, end, is_full = _lane_starts(payload, tile, num_tiles, num_words, CODE_BITS)
            lut = _section(payload, 0, tl.uint16)
            plane = _section(payload, 2 << CODE_BITS, tl.uint32) + tile * (TILE_WEIGHTS // 4)
            for step in tl.static_range(STEPS):
                offset = (lane + (step // 2) * LANES) * 4 + (step % 2) * 2
                e0, e1, e2, e3, bit = _exponents_of_eight(words, bit, lut, CODE_BITS)
                a, b = _merge(tl.load(plane + offset), e0, e1)
                c, d = _merge(tl.load(plane + offset + 1), e2, e3)
                four = _interleave(a, b, c, d)
                halves = tl.join(four & 0xFFFF, four >> 16).to(tl.uint16)
                word = ((lane + step * LANES) * 4)[:, :, None] + pair
                weight = (tile * TILE_WEIGHTS)[:, :, None, None] + word[:, :, :, None] * 2 + half
                mask = (weight >= first) & (weight < first + cols)
                tl.store(out_ptr + shift + weight, halves, mask=mask)
            status = _tile_status(bit, end, is_full)
    if status_ptr is not None:
        place = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(status_ptr + place + tl.zeros_like(status), status)


def decode(
    desc: torch.Tensor,
    num_tiles: int,
    code_bits: int,
    out: torch.Tensor,
    status: torch.Tensor,
    tiles_per_program: int = TILES_PER_PROGRAM,
) -> None:
    """Decode the matrix that `desc` describes into `out`; allocates nothing and waits for nothing.

    Args:
        desc: int64 [4] on the device; the payload it points to was validated when it was made.
        num_tiles: tiles of the matrix.
        code_bits: longest code of the payload.
        out: BF16, flat, contiguous, at least `num_tiles * 2048` elements, aligned to 16 bytes.
        status: int32 [>= num_tiles]; 0 per tile, or a sum of STATUS_* bits.
    """
    if num_tiles:
        grid = (triton.cdiv(num_tiles, tiles_per_program),)
        _decode_kernel[grid](
            desc, out.view(torch.uint32), status, num_tiles, code_bits, tiles_per_program,
            num_warps=tiles_per_program,
        )  # fmt: skip


def tiles_per_row(cols: int) -> int:
    """Return how many tiles a row of `cols` weights touches at most: it starts anywhere in its first tile."""
    return (cols - 2) // layout.TILE_WEIGHTS + 2 if cols > 1 else 1


def decode_rows(
    desc: torch.Tensor,
    ids: torch.Tensor,
    rows: int,
    cols: int,
    code_bits: int,
    out: torch.Tensor,
    status: torch.Tensor | None = None,
) -> None:
    """Decode chosen rows of the matrix [rows, cols] that `desc` describes; allocates nothing and waits for nothing.

    Args:
        desc: int64 [4] on the device; the payload it points to was validated when it was made.
        ids: int64 [n], the rows.
        rows, cols: shape of the matrix.
        code_bits: longest code of the payload.
        out: BF16 [n, cols], contiguous.
        status: int32 [n, tiles_per_row(cols)], contiguous; 0 per tile, or a sum of STATUS_* bits. None: not wanted.
    """
    if out.numel():
        _decode_rows_kernel[(ids.numel(), tiles_per_row(cols))](
            desc, ids, out.view(torch.uint16), status, rows, cols, code_bits, num_warps=1
        )


_ROWS_SPECS = [
    CompileSpec(
        name=name,
        fn=_decode_rows_kernel,
        signature={
            "desc_ptr": "*i64",
            "ids_ptr": "*i64",
            "out_ptr": "*u16",
            "status_ptr": status_type,
            "rows": "i32",
            "cols": "i32",
            "CODE_BITS": "constexpr",
        },
        constexprs={"CODE_BITS": layout.CODE_BITS, **absent},
        aligned_args=("desc_ptr", "ids_ptr", "out_ptr"),
        num_warps=1,
        weights_per_program=layout.TILE_WEIGHTS,
    )
    for name, status_type, absent in (
        ("decode_rows", "constexpr", {"status_ptr": None}),
        ("decode_rows_status", "*i32", {}),
    )
]

COMPILE_SPECS = [
    CompileSpec(
        name="decode",
        fn=_decode_kernel,
        signature={
            "desc_ptr": "*i64",
            "out_ptr": "*u32",
            "status_ptr": "*i32",
            "num_tiles": "i32",
            "CODE_BITS": "constexpr",
            "TILES": "constexpr",
        },
        constexprs={"CODE_BITS": layout.CODE_BITS, "TILES": TILES_PER_PROGRAM},
        aligned_args=("desc_ptr", "out_ptr", "status_ptr"),
        num_warps=TILES_PER_PROGRAM,
        weights_per_program=TILES_PER_PROGRAM * layout.TILE_WEIGHTS,
    ),
    *_ROWS_SPECS,
]
