"""Encode BF16 into the official DFloat11 layout on the GPU: measure the codes, write them, split off the other bits.

The stream is one sequence of codes of up to 32 bits. A lane here is 32 consecutive weights; the start of its codes is
known when all lanes before it are measured. A lane writes its codes, and the first bits of windows and first weights of
blocks. Neighbouring lanes may share a word, so words are joined by atomic OR on zeros; the bits are disjoint, so the
order does not matter.

The bytes equal those of vllm_dfloat.dfloat11.coder; vllm_dfloat.device.unit_coder gives both the same interface.
The kernels look codes up in two tables:

    codes    uint32[256]  per exponent its code in the uppermost bits, zeros below
    lengths  uint8[256]   per exponent the length of its code, 0 if the exponent does not occur
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_dfloat.codec import layout
from vllm_dfloat.dfloat11.format import BLOCK_BITS, WINDOW_BITS
from vllm_dfloat.kernels.configs import config_of
from vllm_dfloat.kernels.tiles import LANES, _four_words

LANE_WEIGHTS = 32

_LANE_WEIGHTS = tl.constexpr(LANE_WEIGHTS)
_LANE_PAIRS = tl.constexpr(LANE_WEIGHTS // 2)
_STEPS = tl.constexpr(LANE_WEIGHTS // 8)
_SYMBOL_SHIFT = tl.constexpr(layout.SYMBOL_SHIFT)
_WORD_LOG = tl.constexpr(5)
_WINDOW_LOG = tl.constexpr(WINDOW_BITS.bit_length() - 1)
_BLOCK_LOG = tl.constexpr(BLOCK_BITS.bit_length() - 1)


# Sizes are not specialized: one compiled kernel serves pieces of all sizes.
@triton.jit(do_not_specialize=["num_weights", "num_lanes"])
def _measure_kernel(
    weights_ptr,  # uint32[num_lanes * 16]   pairs of BF16; anything after the last weight is ignored
    lengths_ptr,  # uint8[256]               see above
    lane_bits_ptr,  # int32[num_lanes]       bits of the codes of each lane
    num_weights,  # int32
    num_lanes,  # int32
    LANES_AT_ONCE: tl.constexpr,
):
    """Measure the codes of LANES_AT_ONCE lanes per program. Grid (ceil(num_lanes / LANES_AT_ONCE),)."""
    lane = tl.program_id(0) * LANES_AT_ONCE + tl.arange(0, LANES_AT_ONCE)
    pair = lane[:, None] * _LANE_PAIRS + tl.arange(0, _LANE_PAIRS)[None, :]
    inside = (lane < num_lanes)[:, None]
    pairs = tl.load(weights_ptr + pair, mask=inside, other=0)
    low = tl.load(lengths_ptr + ((pairs >> _SYMBOL_SHIFT) & 0xFF)).to(tl.int32)
    high = tl.load(lengths_ptr + ((pairs >> (_SYMBOL_SHIFT + 16)) & 0xFF)).to(tl.int32)
    bits = tl.where(2 * pair < num_weights, low, 0) + tl.where(2 * pair + 1 < num_weights, high, 0)
    tl.store(lane_bits_ptr + lane, tl.sum(bits, axis=1), mask=lane < num_lanes)


@triton.jit
def _append(words_ptr, bit, pending, code, length):
    """Append a code of up to 32 bits, left-aligned, at `bit`; return the bit after it, and the new `pending`.

    pending: uint32, the bits of the current word so far, left-aligned; the word is written when it is full. The two
    words of a window are swapped: read as a 64-bit number, the window has its first bit uppermost.
    """
    fill = (bit & 31).to(tl.uint32)
    pending |= code >> fill
    end = bit + length
    is_full = (end >> _WORD_LOG) != (bit >> _WORD_LOG)
    tl.atomic_or(words_ptr + ((bit >> _WORD_LOG) ^ 1), pending, mask=is_full, sem="relaxed")
    # Two shifts, because fill may be 0: then all bits fitted, and pending is 0.
    return end, tl.where(is_full, (code << 1) << (31 - fill), pending)


@triton.jit(do_not_specialize=["num_weights", "num_lanes"])
def _write_kernel(
    weights_ptr,  # uint32[num_lanes * 16]   as above
    codes_ptr,  # uint32[256]                see above
    lengths_ptr,  # uint8[256]               see above
    starts_ptr,  # int64[num_lanes]          bit at which the codes of each lane start
    words_ptr,  # uint32[2 * windows]        zeros on entry
    first_bits_ptr,  # uint8[windows]        set where a code from an earlier window ends: its end
    begins_ptr,  # int64[blocks]             set likewise for blocks: the weight after that code
    num_weights,  # int32
    num_lanes,  # int32
    TILES: tl.constexpr,
):
    """Write the codes of 16 * TILES lanes per program. Grid (ceil(num_lanes / (16 * TILES)),)."""
    first_lane = tl.program_id(0) * (TILES * LANES)
    lane = first_lane + tl.arange(0, TILES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    lane = tl.minimum(lane, num_lanes - 1)  # repeating the last lane does no harm
    # Bits are counted from the block in which the program's first code starts, so 32-bit counts are enough.
    start = tl.load(starts_ptr + lane)
    block = tl.load(starts_ptr + first_lane) >> _BLOCK_LOG
    bit = (start - (block << _BLOCK_LOG)).to(tl.int32)
    words_ptr += block << (_BLOCK_LOG - _WORD_LOG)
    first_bits_ptr += block << (_BLOCK_LOG - _WINDOW_LOG)
    begins_ptr += block
    pending = tl.zeros_like(bit).to(tl.uint32)
    pairs_ptr = weights_ptr + (lane.to(tl.int64) * _LANE_PAIRS)[:, :, None]
    for step in range(_STEPS):
        w0, w1, w2, w3 = _four_words(pairs_ptr + step * 4, TILES)
        for j in tl.static_range(8):
            if j // 2 == 0:
                pair = w0
            elif j // 2 == 1:
                pair = w1
            elif j // 2 == 2:
                pair = w2
            else:
                pair = w3
            symbol = (pair >> (_SYMBOL_SHIFT + 16 * (j % 2))) & 0xFF
            index = lane * _LANE_WEIGHTS + step * 8 + j
            inside = index < num_weights
            length = tl.load(lengths_ptr + symbol, mask=inside, other=0).to(tl.int32)
            code = tl.load(codes_ptr + symbol, mask=inside, other=0)
            end, pending = _append(words_ptr, bit, pending, code, length)
            ends_window = (end >> _WINDOW_LOG) != (bit >> _WINDOW_LOG)
            tl.store(
                first_bits_ptr + (end >> _WINDOW_LOG), (end & 63).to(tl.uint8), mask=ends_window
            )
            ends_block = (end >> _BLOCK_LOG) != (bit >> _BLOCK_LOG)
            after = (index + 1).to(tl.int64)
            tl.store(begins_ptr + (end >> _BLOCK_LOG), after, mask=ends_block)
            bit = end
    tl.atomic_or(words_ptr + ((bit >> _WORD_LOG) ^ 1), pending, mask=(bit & 31) != 0, sem="relaxed")


@triton.jit(do_not_specialize=["num_weights"])
def _split_kernel(
    weights_ptr,  # int16[num_weights]       BF16
    out_ptr,  # uint8[num_weights]           bit 7 sign, bits 6..0 mantissa
    num_weights,  # int32
    AT_ONCE: tl.constexpr,
):
    """Write sign and mantissa of AT_ONCE weights per program. Grid (ceil(num_weights / AT_ONCE),)."""
    at = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    bits = tl.load(weights_ptr + at, mask=at < num_weights, other=0).to(tl.int32)
    tl.store(out_ptr + at, ((bits >> 8) & 0x80 | bits & 0x7F).to(tl.uint8), mask=at < num_weights)


def measure(
    weights: torch.Tensor,
    num_weights: int,
    lengths: torch.Tensor,
    lane_bits: torch.Tensor,
    tiles_per_program: int = 0,
) -> None:
    """Measure the codes of each lane of 32 weights.

    Args:
        weights: BF16 (or other 16-bit words), flat, padded to whole lanes with any values, aligned to 16 bytes.
        num_weights: weights without the padding, fewer than 2**31.
        lengths: uint8 [256], see above.
        lane_bits: int32 [lanes], all written: bits of the codes of each lane.
        tiles_per_program: lanes per program, in multiples of 16; 0 for the value in configs.py.
    """
    lanes = lane_bits.numel()
    config = config_of(weights.device)
    tiles = tiles_per_program or config.dfloat11_encode_tiles_per_program
    lanes_at_once = tiles * layout.LANES
    _measure_kernel[(triton.cdiv(lanes, lanes_at_once),)](
        weights.view(torch.uint32), lengths, lane_bits, num_weights, lanes, lanes_at_once,
        num_warps=config.dfloat11_encode_num_warps,
    )  # fmt: skip


def write(
    weights: torch.Tensor,
    num_weights: int,
    codes: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor,
    words: torch.Tensor,
    first_bits: torch.Tensor,
    begins: torch.Tensor,
    tiles_per_program: int = 0,
) -> None:
    """Write the codes of all lanes, and where windows and blocks begin.

    Args:
        weights, num_weights: as above.
        codes: uint32 [256], see above.
        lengths: uint8 [256], see above.
        starts: int64 [lanes], bit at which the codes of each lane start.
        words: int32 [2 * windows], zeros; bits of the stream are set, as 64-bit windows with the first bit uppermost.
        first_bits: uint8 [windows]; written for every window that begins after the first bit, up to the window of the
            bit after the codes.
        begins: int64 [blocks]; written for blocks by the same rule.
        tiles_per_program: as for `measure`.
    """
    lanes = starts.numel()
    config = config_of(weights.device)
    tiles = tiles_per_program or config.dfloat11_encode_tiles_per_program
    _write_kernel[(triton.cdiv(lanes, tiles * layout.LANES),)](
        weights.view(torch.uint32), codes, lengths, starts, words.view(torch.uint32), first_bits, begins,
        num_weights, lanes, tiles, num_warps=config.dfloat11_encode_num_warps,
    )  # fmt: skip


def split(weights: torch.Tensor, out: torch.Tensor, at_once: int = 0) -> None:
    """Write sign and mantissa of each weight (16-bit words, at least as many) to `out`, uint8 [num_weights].

    Args:
        at_once: weights per program; 0 for the value in configs.py.
    """
    num_weights = out.numel()
    config = config_of(weights.device)
    at_once = at_once or config.dfloat11_split_weights
    _split_kernel[(triton.cdiv(num_weights, at_once),)](
        weights.view(torch.int16),
        out,
        num_weights,
        at_once,
        num_warps=config.dfloat11_encode_num_warps,
    )
