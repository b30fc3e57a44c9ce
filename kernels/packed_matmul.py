"""Multiply a few rows of activations by a packed matrix; decoded weights stay in registers.

    y[m, n] = sum over k of x[m, k] * w[n, k], + bias[n]

A first kernel makes partial sums: one per tile, per row of w that the tile touches, and per row of x, at most 4, in
FP32 multiply-adds (packed_matmul_gemv.py). A second kernel adds the partial sums of each row of w in the order of the
tiles. Every order of addition is fixed, and no sum mixes rows. So the result is deterministic, and the values of other
rows of x do not change the bits of a row. For more rows a form with tensor cores was slower than decoding first
(docs/kernels.md).

Error against the exact sum. The product of two BF16 numbers has 16 bits and is exact in FP32 (below 2**-126 it may lose
up to that much, which rounding to BF16 hides unless the whole sum is as small). So only additions lose bits: a row
takes at most K + 1 additions, of numbers whose absolute values add up to S = sum |x w| + |bias|. Each FP32 addition
loses at most 2**-24 S. Tensor cores align the addends that they add at once to the largest, itself at most S, and cut
off below 24 bits, which loses at most 2**-23 S per addend. Together |y - exact| <= (K + 1) 2**-23 S, and rounding y to
BF16 adds 2**-8 |y|.
"""

import torch
import triton
import triton.language as tl

from vllm_dfloat.codec import descriptor, layout
from vllm_dfloat.kernels.configs import SUM_ROWS, config_of
from vllm_dfloat.kernels.packed_matmul_gemv import _gemv_kernel
from vllm_dfloat.kernels.packed_matmul_parts import MAX_SEGMENTS, num_segments
from vllm_dfloat.kernels.tiles import TILE_WEIGHTS, num_warps

MAX_ROWS = 4
MAX_COLS = 2**26


def is_supported(cols: int) -> bool:
    """Return whether `matmul` takes matrices of `cols` columns.

    The 8 weights of a step must lie in one row, a tile must not touch too many rows, and 32-bit offsets must reach all
    of 4 rows of x.
    """
    is_whole = 0 < cols < MAX_COLS and cols % layout.STEP_WEIGHTS == 0
    return is_whole and num_segments(cols) <= MAX_SEGMENTS


def compiled_rows(num_x: int) -> int:
    """Return the row count, 1, 2 or 4, of the compiled kernel that multiplies `num_x` rows of x."""
    return 1 << (num_x - 1).bit_length()


def num_partials(num_tiles: int, cols: int, num_x: int) -> int:
    """Return how many partial sums `matmul` makes: at most 16 for each tile of 2048 weights."""
    return num_tiles * num_segments(cols) * compiled_rows(num_x)


@triton.jit
def _round(value):
    """Return FP32 rounded to BF16 (nearest, ties to even) as bits; done by hand, because the interpreter truncates."""
    bits = value.to(tl.uint32, bitcast=True)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(value == value, nearest, (bits >> 16) | 0x40).to(tl.uint16)


@triton.jit(do_not_specialize=["rows", "cols", "num_x"])
def _sum_kernel(
    part_ptr,  # float32[num_tiles, SEGMENTS, ROWS]
    bias_ptr,  # bfloat16 or float32[rows], not read unless HAS_BIAS
    out_ptr,  # uint16[num_x, rows]                   BF16 bits
    rows,  # int32
    cols,  # int32
    num_x,  # int32
    ROWS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SUM_ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Add the partial sums of SUM_ROWS rows of w, each in the order of its tiles. Grid (ceil(rows / SUM_ROWS),)."""
    row = tl.program_id(0) * SUM_ROWS + tl.arange(0, SUM_ROWS)[:, None]
    m = tl.arange(0, ROWS)[None, :]
    first = row.to(tl.int64) * cols
    first_tile = first // TILE_WEIGHTS
    last_tile = (first + cols - 1) // TILE_WEIGHTS
    total = tl.zeros([SUM_ROWS, ROWS], tl.float32)
    tiles = (cols + TILE_WEIGHTS - 2) // TILE_WEIGHTS + 1
    i = 0
    while (
        i < tiles
    ):  # no range(): Triton 3.6's interpreter cannot take its bound from a tensor with NumPy 2.4
        tile = first_tile + i
        segment = row - tile * TILE_WEIGHTS // cols
        at = (tile * SEGMENTS + segment) * ROWS + m
        total += tl.load(part_ptr + at, mask=(row < rows) & (tile <= last_tile), other=0.0)
        i += 1
    if HAS_BIAS:
        total += tl.load(bias_ptr + row, mask=row < rows, other=0.0).to(tl.float32)
    tl.store(out_ptr + m.to(tl.int64) * rows + row, _round(total), mask=(row < rows) & (m < num_x))


def matmul(
    x: torch.Tensor,
    desc: torch.Tensor,
    bias: torch.Tensor | None,
    cols: int,
    out: torch.Tensor,
    partials: torch.Tensor,
    status: torch.Tensor,
) -> None:
    """Write x @ w.T + bias to `out`; allocates nothing and does not wait for the device.

    Args:
        x: BF16 [num_x, cols], contiguous, 1 to 4 rows; `is_supported(cols)`.
        desc: int64 [4] of w [rows, cols], made by this process; the payload is read only if its seal is right.
        bias: BF16 or FP32 [rows], or None.
        cols: columns of w.
        out: BF16 [num_x, rows], contiguous.
        partials: FP32, at least `num_partials(num_tiles, cols, num_x)` elements; overwritten.
        status: int32, at least a word per tile; 0, or a sum of STATUS_* bits.
    """
    num_x, rows = out.shape
    if not out.numel():
        return
    num_tiles = -(-rows * cols // layout.TILE_WEIGHTS)
    compiled, segments = compiled_rows(num_x), num_segments(cols)
    config = config_of(x.device)
    salt = descriptor.salt(desc.data_ptr(), num_tiles)
    tiles = config.fused_gemv_tiles_per_program
    _gemv_kernel[(triton.cdiv(num_tiles, tiles),)](
        desc, x.view(torch.uint32), partials, status, num_tiles, cols, num_x, salt,
        tiles, compiled, segments, num_warps=num_warps(tiles),
    )  # fmt: skip
    _sum_kernel[(triton.cdiv(rows, SUM_ROWS),)](
        partials, x if bias is None else bias, out.view(torch.uint16), rows, cols, num_x,
        compiled, segments, SUM_ROWS, bias is not None,
    )  # fmt: skip
