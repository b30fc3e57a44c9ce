"""Shared by the kernels of the packed layout: find the lanes of a tile, and decode them 8 weights at a time.

A tile has 16 lanes, so a warp decodes two tiles, one lane per thread. A thread finds its lane's first bit by a scan
over the lane lengths of its tile. It holds the two words of the stream at its current bit, and the next one. For every
8 weights it looks up their codes, three in a window of 32 bits, and merges exponents with signs and mantissas two at a
time.

The kernels take a descriptor instead of the payload. So a traced graph holds nothing whose size depends on the weights,
and a captured CUDA graph sees new weights after a reload:

    desc  int64[4]  address of the payload, kind (0 packed, 1 raw), number of words and code_bits, seal

For any bytes of a payload, every loop has a constant bound and no read leaves the payload: a lane starts at or before
the last word that is not padding, and reads at most `PAD_WORDS` from there. For any words of a descriptor, the payload
is read only if the seal is right (vllm_dfloat/codec/descriptor.py). If it is wrong, every weight becomes NaN and every
tile gets a status: the output may still hold another layer's weights, and these must not be used.
"""

import triton
import triton.language as tl

from vllm_dfloat.codec import descriptor, layout

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
STATUS_DESCRIPTOR = tl.constexpr(
    4
)  # the seal of the descriptor, or of the table it stands in, is wrong

ADDRESS_FACTOR = tl.constexpr(descriptor.ADDRESS_FACTOR)
KIND_FACTOR = tl.constexpr(descriptor.KIND_FACTOR)
SIZES_FACTOR = tl.constexpr(descriptor.SIZES_FACTOR)
ROW_FACTOR = tl.constexpr(descriptor.ROW_FACTOR)
NAN_PAIR = tl.constexpr(0x7FC07FC0)  # two weights that are NaN


def num_warps(tiles: int) -> int:
    """Return the warps of a program that works on `tiles` tiles: one thread per lane."""
    return max(1, tiles * layout.LANES // 32)


def is_compiled() -> bool:
    """Return whether Triton compiles the kernels for a GPU, and does not interpret them."""
    return isinstance(_section, triton.runtime.JITFunction)


@triton.jit
def _section(payload, offset, dtype: tl.constexpr):
    """Return a pointer to a section of the payload; payload and sections start on multiples of 16 bytes.

    `make_descriptor` and `check_descriptor` (packed_weight.py) check the alignment of the payload.
    """
    base = tl.multiple_of(payload.to(tl.pointer_type(tl.uint8)), 16)
    return (base + offset).to(tl.pointer_type(dtype))


@triton.jit
def _read(desc_ptr, salt, is_known=None):
    """Read a descriptor once; return whether it is sound, the address of the payload, kind and sizes.

    The other results may be used only if it is sound. is_known: if false, the descriptor does not count as sound.
    """
    address = tl.load(desc_ptr)
    kind = tl.load(desc_ptr + 1)
    sizes = tl.load(desc_ptr + 2)
    seal = tl.load(desc_ptr + 3)
    found = address * ADDRESS_FACTOR + kind * KIND_FACTOR + sizes * SIZES_FACTOR + salt
    is_sound = found == seal
    if is_known is not None:
        is_sound = is_sound & is_known
    return is_sound, address, kind, sizes


@triton.jit
def _everywhere(like, condition):
    """Return a mask of the shape of the integer tensor `like`, equal to the scalar `condition` everywhere.

    Triton's interpreter does not take a scalar as a mask.
    """
    return (tl.zeros_like(like) + condition.to(like.dtype)) != 0


@triton.jit
def _lut_bytes(code_bits):
    # As a product, so that the compiler knows that the sections after the LUT are aligned.
    return (tl.full([], 1, tl.int64) << (code_bits - 3)) * 16


@triton.jit
def _lane_starts(payload, tile, num_tiles, num_words, code_bits):
    """Return per tile a pointer to its words, and whether its lanes fill them; per lane its first bit and its end.

    Starts are clamped to the words that are not padding.
    """
    lengths_offset = (_lut_bytes(code_bits)) + num_tiles * TILE_WEIGHTS
    starts_offset = lengths_offset + num_tiles * LANES
    words_offset = starts_offset + (4 * (num_tiles + 1) + 15) // 16 * 16
    lane = tl.arange(0, LANES)[None, :]
    lengths = _section(payload, lengths_offset, tl.uint8)
    length = tl.load(lengths + (tile * LANES + lane)).to(tl.int32) * LANE_LENGTH_UNIT
    end = tl.cumsum(length, axis=1)
    starts = _section(payload, starts_offset, tl.uint32)
    limit = num_words - PAD_WORDS  # below 2**31, as all that is clamped to it
    begin_word = tl.minimum(tl.load(starts + tile), limit)
    end_word = tl.minimum(tl.load(starts + tile + 1), limit)
    room = tl.minimum(limit - begin_word, MAX_TILE_WORDS).to(tl.int32)
    start = tl.minimum(end - length, room * 32)
    tile_bits = tl.sum(length, axis=1, keep_dims=True)
    is_full = (tile_bits + 31) // 32 == (end_word - begin_word).to(tl.int32)
    words = _section(payload, words_offset, tl.uint32) + begin_word
    return words, is_full, start, end


@triton.jit
def _open(payload, sizes, tile, num_tiles):
    """Return the constants and the initial lane states needed to decode tiles.

    payload, sizes: from a descriptor whose seal is right.
    tile: int64 [TILES, 1], tiles of the matrix; num_tiles: an int64, all tiles of the matrix.

    Returns the LUT and the shift from a window to an index into it; per tile its signs and mantissas, its words and
    whether its lanes fill them; per lane its end, and its state: the current bit, the two words there and
    the next one.
    """
    num_words = sizes.to(tl.uint32)  # its lower half
    code_bits = sizes >> 32
    words, is_full, bit, end = _lane_starts(payload, tile, num_tiles, num_words, code_bits)
    plane = _section(payload, _lut_bytes(code_bits), tl.uint32) + tile * (TILE_WEIGHTS // 4)
    word = words + (bit >> 5)
    shift = (32 - code_bits).to(tl.uint32)
    lut = _section(payload, 0, tl.uint16)
    word0, word1, word2 = tl.load(word), tl.load(word + 1), tl.load(word + 2)
    return lut, shift, plane, words, is_full, end, bit, word0, word1, word2


@triton.jit
def _exponents_of_eight(
    words,
    bit,
    word0,
    word1,
    word2,
    lut,
    shift,
    PER_WINDOW: tl.constexpr = 32 // layout.MAX_CODE_BITS,
):
    """Decode the next 8 weights of each lane; return 4 pairs of LUT entries, and the state after them.

    Each word is loaded once, a word before it is needed, so that no look-up waits for it.
    """
    window = tl.zeros_like(word0)
    first = window
    pair0 = window
    pair1 = window
    pair2 = window
    pair3 = window
    before = bit >> 5
    for j in tl.static_range(8):
        if j % PER_WINDOW == 0:
            fill = (bit & 31).to(tl.uint32)
            # Written as two shifts, the right half is correct for fill 0 too, and compiles to one funnel shift.
            window = (word0 << fill) | ((word1 >> 1) >> (31 - fill))
        entry = tl.load(lut + (window >> shift)).to(tl.uint32)
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
        if j % PER_WINDOW == PER_WINDOW - 1 or j == 7:
            word = bit >> 5
            is_next = word != before
            word0 = tl.where(is_next, word1, word0)
            word1 = tl.where(is_next, word2, word1)
            word2 = tl.load(words + (word + 2), mask=is_next, other=word2)
            before = word
    return pair0, pair1, pair2, pair3, bit, word0, word1, word2


@triton.jit
def _merge(sign_mantissa, low_pair, high_pair):
    """Return the BF16 bits of 4 weights as two words: one bit-select each, the second after a rotation by 8 bits."""
    turned = (sign_mantissa >> 8) | (sign_mantissa << 24)
    low = (sign_mantissa & SIGN_MANTISSA_MASK) | (low_pair & EXPONENT_MASK)
    high = (turned & SIGN_MANTISSA_MASK) | (high_pair & EXPONENT_MASK)
    return low, high


@triton.jit
def _interleave(a, b, c, d):
    """Return [..., 4] with a, b, c, d along the last axis; each thread keeps its values."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), a.shape + [4])  # noqa: RUF005 (Triton has no starred lists)


@triton.jit
def _four_words(pointers, TILES: tl.constexpr):
    """Load 16 bytes per lane from pointers [TILES, LANES, 1]; return the 4 words [TILES, LANES]."""
    four = tl.load(pointers + tl.arange(0, 4)[None, None, :])
    even, odd = tl.split(tl.reshape(four, [TILES, LANES, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _tile_status(bit, end, is_full):
    """Return the status of tiles [TILES, 1] from the reached and the expected end of their lanes [TILES, LANES]."""
    used = (bit + (LANE_LENGTH_UNIT - 1)) // LANE_LENGTH_UNIT * LANE_LENGTH_UNIT
    wrong = tl.max((used != end).to(tl.int32), axis=1, keep_dims=True) * STATUS_LANE_END
    return wrong + (1 - is_full.to(tl.int32)) * STATUS_TILE_END
