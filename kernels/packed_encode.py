"""Encode BF16 into the packed layout on the GPU: count the exponents (encode_count.py), measure lanes, write the codes.

Three passes over the weights, as in vllm_dfloat.codec.encode, give the same bytes. Between the passes the host makes
the code from 256 counts, and allocates the payload when the number of words is known. A warp measures or writes two
tiles, a thread one lane of 128 weights, as in decoding.

Neighbouring lanes share a word unless the first ends at a word's last bit, so words are joined by atomic OR on zeros.
The bits are disjoint, so the result does not depend on the order.

The kernels look codes up in a table:

    table  uint32[256]  per exponent the code in the uppermost bits | its length; 0 if the exponent does not occur
"""

import torch
import triton
import triton.language as tl

from vllm_dfloat.codec import layout
from vllm_dfloat.kernels.configs import config_of
from vllm_dfloat.kernels.encode_count import SYMBOL_SHIFT, TILE_PAIRS
from vllm_dfloat.kernels.encode_count import count_exponents as count_exponents
from vllm_dfloat.kernels.tiles import (
    LANE_LENGTH_UNIT,
    LANES,
    LENGTH_MASK,
    SIGN_MANTISSA_MASK,
    STEPS,
    _four_words,
    _interleave,
    num_warps,
)


@triton.jit
def _tiles_of_program(num_tiles, TILES: tl.constexpr):
    """Return the tiles of this program, int64 [TILES, 1]; past the end the last tile is repeated, without harm."""
    tile = (tl.program_id(0).to(tl.int64) * TILES + tl.arange(0, TILES))[:, None]
    return tl.minimum(tile, num_tiles.to(tl.int64) - 1)


# Sizes are not specialized: a layer of another size must not compile another kernel while the model loads.
@triton.jit(do_not_specialize=["first_tile", "num_tiles"])
def _measure_kernel(
    weights_ptr,  # uint32[num_tiles * 1024]   pairs of BF16, tiles `first_tile` and on of the matrix
    table_ptr,  # uint32[256]                  see above
    lane_lengths_ptr,  # uint8[all tiles, 16]  bits of each lane / 8, rounded up
    tile_words_ptr,  # int32[all tiles]        words of each tile
    first_tile,  # int32
    num_tiles,  # int32
    TILES: tl.constexpr,
):
    """Measure the lanes of TILES tiles per program. Grid (ceil(num_tiles / TILES),)."""
    tile = _tiles_of_program(num_tiles, TILES)
    lane = tl.arange(0, LANES)[None, :]
    pairs_ptr = weights_ptr + (tile * TILE_PAIRS)[:, :, None]
    target = first_tile + tile
    lengths_ptr = table_ptr.to(tl.pointer_type(tl.uint8))  # the low byte of an entry is the length
    quad = tl.arange(0, 4)[None, None, :]
    bits = tl.zeros([TILES, LANES, 4], tl.int32)
    for step in range(STEPS):
        pairs = tl.load(pairs_ptr + (((lane + step * LANES) * 4)[:, :, None] + quad))
        low = tl.load(lengths_ptr + ((pairs >> (SYMBOL_SHIFT - 2)) & 0x3FC))
        high = tl.load(lengths_ptr + ((pairs >> (SYMBOL_SHIFT + 14)) & 0x3FC))
        bits += low.to(tl.int32) + high.to(tl.int32)
    lengths = (tl.sum(bits, axis=2) + (LANE_LENGTH_UNIT - 1)) // LANE_LENGTH_UNIT
    tl.store(lane_lengths_ptr + (target * LANES + lane), lengths.to(tl.uint8))
    tile_bits = tl.sum(lengths, axis=1, keep_dims=True) * LANE_LENGTH_UNIT
    tl.store(tile_words_ptr + target, (tile_bits + 31) // 32)


@triton.jit
def _append(words_ptr, bit, pending, codes, length):
    """Append up to 30 bits of codes, left-aligned with zeros below, at `bit`; return the bit after, and `pending`.

    pending: uint32, the bits of the current word so far, left-aligned; the word is written when it is full.
    """
    fill = (bit & 31).to(tl.uint32)
    pending |= codes >> fill
    end = bit + length
    is_full = (end >> 5) != (bit >> 5)
    tl.atomic_or(words_ptr + (bit >> 5), pending, mask=is_full, sem="relaxed")
    # Two shifts, because fill may be 0: then all bits fitted, and pending is 0.
    return end, tl.where(is_full, (codes << 1) << (31 - fill), pending)


@triton.jit
def _append_eight(
    words_ptr, bit, pending, table_ptr, w0, w1, w2, w3, GROUP: tl.constexpr = 30 // layout.MAX_CODE_BITS
):  # fmt: skip
    """Append the codes of 8 weights, given as 4 pairs, GROUP at a time; return the bit after them, and `pending`."""
    codes = tl.zeros_like(pending)
    length = tl.zeros_like(pending)
    for j in tl.static_range(8):
        if j // 2 == 0:
            pair = w0
        elif j // 2 == 1:
            pair = w1
        elif j // 2 == 2:
            pair = w2
        else:
            pair = w3
        symbol = (pair >> (SYMBOL_SHIFT + 16 * (j % 2))) & 0xFF
        entry = tl.load(table_ptr + symbol)
        # The low bits of an entry are its length. The shift by one bit or more per earlier code moves it off the codes.
        if j % GROUP == 0:
            codes = entry & (LENGTH_MASK ^ 0xFFFFFFFF)
            length = entry & LENGTH_MASK
        else:
            codes |= (entry >> length) & ((LENGTH_MASK >> (j % GROUP)) ^ 0xFFFFFFFF)
            length += entry & LENGTH_MASK
        if j % GROUP == GROUP - 1 or j == 7:
            bit, pending = _append(words_ptr, bit, pending, codes, length.to(tl.int32))
    return bit, pending


@triton.jit
def _signs_and_mantissas(low, high):
    """Return the signs and mantissas of 4 weights as one word: two in place, the next two rotated left by 8 bits."""
    turned = high & SIGN_MANTISSA_MASK
    return (low & SIGN_MANTISSA_MASK) | (turned << 8) | (turned >> 24)


@triton.jit(do_not_specialize=["first_tile", "num_tiles"])
def _write_kernel(
    weights_ptr,  # uint32[num_tiles * 1024]    pairs of BF16, tiles `first_tile` and on of the matrix
    table_ptr,  # uint32[256]                   see above
    lane_lengths_ptr,  # uint8[all tiles, 16]   as measured
    tile_starts_ptr,  # int32[all tiles]        first word of each tile
    sign_mantissa_ptr,  # uint32[all tiles, 8, 16, 4]
    words_ptr,  # uint32[num_words]             zeros on entry
    first_tile,  # int32
    num_tiles,  # int32
    TILES: tl.constexpr,
):
    """Write the codes, signs and mantissas of TILES tiles per program. Grid (ceil(num_tiles / TILES),)."""
    tile = _tiles_of_program(num_tiles, TILES)
    lane = tl.arange(0, LANES)[None, :]
    quad = tl.arange(0, 4)[None, None, :]
    target = first_tile + tile
    lengths = tl.load(lane_lengths_ptr + (target * LANES + lane)).to(tl.int32)
    bit = (tl.cumsum(lengths, axis=1) - lengths) * LANE_LENGTH_UNIT
    words_ptr += tl.load(tile_starts_ptr + target).to(tl.int64)
    pending = tl.zeros_like(bit).to(tl.uint32)
    pairs_ptr = weights_ptr + (tile * TILE_PAIRS)[:, :, None]
    plane_ptr = sign_mantissa_ptr + (target * (TILE_PAIRS // 2))[:, :, None]
    for half in range(STEPS // 2):
        for k in tl.static_range(2):
            offset = ((lane + (half * 2 + k) * LANES) * 4)[:, :, None]
            w0, w1, w2, w3 = _four_words(pairs_ptr + offset, TILES)
            bit, pending = _append_eight(words_ptr, bit, pending, table_ptr, w0, w1, w2, w3)
            if k == 0:
                sm0 = _signs_and_mantissas(w0, w1)
                sm1 = _signs_and_mantissas(w2, w3)
            else:
                sm2 = _signs_and_mantissas(w0, w1)
                sm3 = _signs_and_mantissas(w2, w3)
        offset = ((lane + half * LANES) * 4)[:, :, None] + quad
        tl.store(plane_ptr + offset, _interleave(sm0, sm1, sm2, sm3))
    tl.atomic_or(words_ptr + (bit >> 5), pending, mask=(bit & 31) != 0, sem="relaxed")


def measure(
    tiles: torch.Tensor,
    first_tile: int,
    table: torch.Tensor,
    lane_lengths: torch.Tensor,
    tile_words: torch.Tensor,
    tiles_per_program: int = 0,
) -> None:
    """Measure the codes of each lane and tile.

    Args:
        tiles: BF16 (or other 16-bit words), flat, whole tiles, aligned to 16 bytes.
        first_tile: index of the first of these tiles in the matrix.
        table: uint32 [256], see above.
        lane_lengths: uint8 [all tiles, 16]; written for these tiles: bits / 8, rounded up.
        tile_words: int32 [all tiles]; written for these tiles: words of the tile's codes.
        tiles_per_program: 0 for the value in configs.py.
    """
    num_tiles = tiles.numel() // layout.TILE_WEIGHTS
    if num_tiles:
        at_once = tiles_per_program or config_of(tiles.device).encode_tiles_per_program
        _measure_kernel[(triton.cdiv(num_tiles, at_once),)](
            tiles.view(torch.uint32), table, lane_lengths, tile_words,
            first_tile, num_tiles, at_once, num_warps=num_warps(at_once),
        )  # fmt: skip


def write(
    tiles: torch.Tensor,
    first_tile: int,
    table: torch.Tensor,
    lane_lengths: torch.Tensor,
    tile_starts: torch.Tensor,
    sign_mantissa: torch.Tensor,
    words: torch.Tensor,
    tiles_per_program: int = 0,
) -> None:
    """Write the codes, signs and mantissas of whole tiles into their sections of a payload.

    Args:
        tiles: as for `measure`.
        first_tile: index of the first of these tiles in the matrix.
        table: uint32 [256], see above.
        lane_lengths: uint8 [all tiles, 16], as measured.
        tile_starts: int32 [all tiles + 1], first word of each tile.
        sign_mantissa: uint32 [all tiles * 512], written for these tiles.
        words: uint32 [num_words], zeros where these tiles write.
        tiles_per_program: 0 for the value in configs.py.
    """
    num_tiles = tiles.numel() // layout.TILE_WEIGHTS
    if num_tiles:
        at_once = tiles_per_program or config_of(tiles.device).encode_tiles_per_program
        _write_kernel[(triton.cdiv(num_tiles, at_once),)](
            tiles.view(torch.uint32), table, lane_lengths, tile_starts, sign_mantissa, words,
            first_tile, num_tiles, at_once, num_warps=num_warps(at_once),
        )  # fmt: skip
