"""Count how often each exponent occurs in BF16 weights: the first pass of encoding, for both layouts.

There are two forms, chosen by the version of Triton. The first uses `tl.histogram`: from Triton 3.9 on it adds with
atomics in shared memory, in 4.5 instructions per weight. Before, it votes for each of 256 exponents, in 55. So older
versions count in a window: each thread counts, in registers, a window of 16 exponents around the largest, where nearly
all weights are, and adds the others one by one to the result.
"""

import torch
import triton
import triton.language as tl

from vllm_dfloat.codec import layout
from vllm_dfloat.kernels.configs import config_of

TILE_PAIRS = tl.constexpr(layout.TILE_WEIGHTS // 2)
SYMBOL_SHIFT = tl.constexpr(layout.SYMBOL_SHIFT)
NUM_SYMBOLS = tl.constexpr(256)

BY_WINDOW = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9)
# A counter of one byte counts at most 8 weights per tile; 256 counters are summed in 16 bits: 256 * 8 * 31 < 2**16.
MAX_WINDOW_TILES = 31

_WINDOW = tl.constexpr(16)
_LOW_NIBBLES = tl.constexpr(0x0F0F0F0F0F0F0F0F)
_LOW_BYTES = tl.constexpr(0x00FF00FF00FF00FF)


# Sizes are not specialized: a layer of another size must not compile another kernel while the model loads.
@triton.jit(do_not_specialize=["num_tiles"])
def _count_kernel(
    weights_ptr,  # uint32[num_tiles * 1024]   pairs of BF16, whole tiles
    counts_ptr,  # int64[256]                  added to
    num_tiles,  # int32
    TILES: tl.constexpr,
    BY_WINDOW: tl.constexpr,
):
    """Add to `counts` how often each exponent occurs in TILES tiles per program. Grid (ceil(num_tiles / TILES),)."""
    first = tl.program_id(0).to(tl.int64) * TILES
    if BY_WINDOW:
        _count_in_window(weights_ptr, counts_ptr, first, num_tiles, TILES)
    else:
        _count_in_histogram(weights_ptr, counts_ptr, first, num_tiles, TILES)


@triton.jit
def _count_in_histogram(weights_ptr, counts_ptr, first, num_tiles, TILES: tl.constexpr):
    pair = tl.arange(0, TILE_PAIRS)
    counts = tl.zeros([NUM_SYMBOLS], tl.int32)
    for i in range(TILES):
        tile = first + i
        if tile < num_tiles:
            pairs = tl.load(weights_ptr + tile * TILE_PAIRS + pair)
            low = (pairs >> SYMBOL_SHIFT) & 0xFF
            high = (pairs >> (SYMBOL_SHIFT + 16)) & 0xFF
            both = tl.reshape(tl.join(low, high), [TILE_PAIRS * 2])
            counts += tl.histogram(both.to(tl.int32), NUM_SYMBOLS)
    symbol = tl.arange(0, NUM_SYMBOLS)
    tl.atomic_add(counts_ptr + symbol, counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@triton.jit
def _count_in_window(weights_ptr, counts_ptr, first, num_tiles, TILES: tl.constexpr):
    four = tl.arange(0, TILE_PAIRS // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    # The window ends one above the largest exponent of the first tile.
    pairs = tl.load(weights_ptr + first * TILE_PAIRS + four)
    low = (pairs >> SYMBOL_SHIFT) & 0xFF
    high = (pairs >> (SYMBOL_SHIFT + 16)) & 0xFF
    largest = tl.max(tl.maximum(low, high).to(tl.int32))
    nearest = tl.maximum(largest - (_WINDOW - 2), 1).to(tl.uint32)
    even = tl.zeros([TILE_PAIRS // 4], tl.uint64)  # each with 8 counters of 8 bits
    odd = even
    zeros = tl.zeros([TILE_PAIRS // 4, 4], tl.int32)
    for i in range(TILES):
        tile = first + i
        if tile < num_tiles:
            pairs = tl.load(weights_ptr + tile * TILE_PAIRS + four)
            low = (pairs >> SYMBOL_SHIFT) & 0xFF
            high = (pairs >> (SYMBOL_SHIFT + 16)) & 0xFF
            nibbles = _count_four(low, nearest, counts_ptr) + _count_four(high, nearest, counts_ptr)
            even += nibbles & _LOW_NIBBLES
            odd += (nibbles >> 4) & _LOW_NIBBLES
            zeros += (low == 0).to(tl.int32) + (high == 0).to(tl.int32)
    place = tl.arange(0, _WINDOW)
    counts = tl.zeros([_WINDOW], tl.int32)
    for k in tl.static_range(4):  # places k, k + 4, k + 8 and k + 12
        counters = (even if k % 2 == 0 else odd) >> (k // 2 * 8)
        sums = tl.sum(counters & _LOW_BYTES)
        these = ((sums >> (place // 4 * 16).to(tl.uint64)) & 0xFFFF).to(tl.int32)
        counts += tl.where(place % 4 == k, these, 0)
    tl.atomic_add(counts_ptr + nearest + place, counts.to(tl.int64), mask=counts > 0, sem="relaxed")
    tl.atomic_add(counts_ptr, tl.sum(zeros).to(tl.int64), sem="relaxed")


@triton.jit
def _count_four(symbol, nearest, counts_ptr):
    """Return, for each four symbols [.., 4], how often each of the 16 from `nearest` on occurs, 4 bits each.

    Other symbols are added to the counts one by one. Symbol 0 is left to the caller: half of a matrix may be zeros, and
    their atomics would all go to one address.
    """
    place = symbol - nearest
    is_near = place < _WINDOW
    is_far = (~is_near) & (symbol != 0)
    one = tl.full(
        symbol.shape, 1, tl.int64
    )  # Triton 3.6 does not interpret an atomic of a broadcast
    tl.atomic_add(counts_ptr + symbol, one, mask=is_far, sem="relaxed")
    return tl.sum(is_near.to(tl.uint64) << (place * 4 & 63).to(tl.uint64), axis=1)


def count_exponents(
    tiles: torch.Tensor,
    counts: torch.Tensor,
    tiles_per_program: int = 0,
    by_window: bool = BY_WINDOW,
) -> None:
    """Add to `counts`, int64 [256], how often each exponent occurs.

    Args:
        tiles: BF16 (or other 16-bit words), flat, whole tiles, aligned to 16 bytes.
        counts: int64 [256], added to.
        tiles_per_program: 0 for the value in configs.py; with `by_window` at most `MAX_WINDOW_TILES` are used.
        by_window: count in a window instead of a histogram.
    """
    num_tiles = tiles.numel() // layout.TILE_WEIGHTS
    if num_tiles:
        config = config_of(tiles.device)
        if by_window:
            wanted = tiles_per_program or config.count_window_tiles_per_program
            tiles_per_program = min(wanted, MAX_WINDOW_TILES)
        else:
            tiles_per_program = tiles_per_program or config.count_tiles_per_program
        _count_kernel[(triton.cdiv(num_tiles, tiles_per_program),)](
            tiles.view(torch.uint32), counts, num_tiles, tiles_per_program, by_window,
            num_warps=config.count_num_warps,
        )  # fmt: skip
