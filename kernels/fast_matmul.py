"""Multiply up to 256 rows of activations by a matrix in the fast layout; decoded weights stay in registers.

    y[m, n] = sum over k of x[m, k] * w[n, k], + bias[n]

There are four forms: FP32 multiply-adds for at most 4 rows of x (fast_matmul_gemv.py), tensor cores
(fast_matmul_dot.py), and those of a warp, loaded ahead, for a few rows of w (fast_matmul_ahead.py) or some for each
warp (fast_matmul_bands.py). Only the last takes more than 64 rows of x. In each a program has some rows of w and all
columns, or one of PARTS equal parts of the columns; with parts, a second kernel adds their sums in order. Every order
of addition is fixed, and no sum mixes rows. So the result is deterministic, and the values of other rows of x do not
change the bits of a row. The forms add in different orders, so a row's bits may change with the number of rows.

Error against the exact sum: as kernels/packed_matmul.py derives, |y - exact| <= (K + 1) 2**-23 S with
S = sum |x w| + |bias|, and rounding y to BF16 adds 2**-8 |y|. A row takes at most K products into account, each added
once to a sum; sums of threads, of parts and the bias are further additions, but each joins two sums that hold disjoint
products, and so there are at most K additions of products and sums, and one of the bias.
"""

import functools

import torch
import triton
import triton.language as tl

from vllm_dfloat.codec import descriptor, fast_layout
from vllm_dfloat.codec.fast_layout import TILE_COLS
from vllm_dfloat.kernels.fast_escapes import PERMUTED, PLAIN, _round
from vllm_dfloat.kernels.fast_matmul_ahead import _ahead_kernel
from vllm_dfloat.kernels.fast_matmul_bands import _bands_kernel
from vllm_dfloat.kernels.fast_matmul_dot import _dot_kernel
from vllm_dfloat.kernels.fast_matmul_gemv import _gemv_kernel
from vllm_dfloat.kernels.fast_planes import LOW_BYTES
from vllm_dfloat.kernels.fast_product import (
    LOW_BAND,
    MAX_AT_ONCE,
    MAX_DOT_ROWS,
    MAX_LOW_ROWS,
    TALL_BAND,
    DotShape,
    GemvShape,
)
from vllm_dfloat.kernels.tiles import is_compiled

TRITON_VERSION: str = triton.__version__
MAX_GEMV_ROWS = 4
MAX_ROWS = 256
MAX_COLS = 2**31 // MAX_ROWS
SUM_ROWS = 256  # rows of w per program of the kernel that adds the sums of parts


def is_supported(cols: int) -> bool:
    """Return whether `matmul` takes matrices of `cols` columns: multiples of 128, within reach of 32-bit offsets."""
    return 0 < cols < MAX_COLS and cols % TILE_COLS == 0


def max_rows(shape: DotShape | GemvShape) -> int:
    """Return the largest number of rows of x that a kernel takes."""
    if isinstance(shape, GemvShape):
        return MAX_GEMV_ROWS
    if not shape.has_bands:
        return MAX_DOT_ROWS
    return MAX_LOW_ROWS if shape.band == LOW_BAND else MAX_ROWS


def compiled_rows(num_x: int, shape: DotShape | GemvShape) -> int:
    """Return for how many rows of x the kernel that multiplies `num_x` rows is compiled."""
    padded = min(1 << (num_x - 1).bit_length(), MAX_AT_ONCE)
    if isinstance(shape, GemvShape):
        return padded
    if shape.has_bands:
        return MAX_LOW_ROWS if shape.band == LOW_BAND else max(padded, 2 * MAX_LOW_ROWS)
    return max(padded, 8 if shape.width == 4 and shape.rows > 8 else 16)


def max_registers(shape: DotShape, compiled: int) -> int | None:
    """Return how many registers a thread may have on an NVIDIA GPU, that as many warps run as do without spills.

    Left to itself ptxas takes up to 167 for the same instructions, and of a matrix that would fit at once a last part
    runs alone. None: no limit, since registers would spill.
    """
    is_alone = shape.has_bands or (shape.stages == 1 and shape.warps == 1)
    return 128 if is_alone and shape.rows >= 16 and compiled <= 16 else None


def must_wait(triton_version: str, capability: tuple[int, int]) -> bool:
    """Return whether a product on the tensor cores of a warp group must end each turn with a wait for its sums.

    Hopper's may read the weights' registers long after the instruction. Triton before 3.8 lets the next turn write
    them without waiting (triton-lang/triton#9433): 3.6 with up to 7 steps of 8 not done, 3.7 with 4.
    """
    major, minor = triton_version.split(".")[:2]
    return (int(major), int(minor)) < (3, 8) and capability[0] == 9


@functools.cache
def _must_wait(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return must_wait(TRITON_VERSION, torch.cuda.get_device_capability(device))


def num_partials(rows: int, num_x: int, shape: DotShape | GemvShape) -> int:
    """Return how many FP32 numbers of scratch memory `matmul` needs."""
    compiled = compiled_rows(num_x, shape)
    padded = triton.cdiv(num_x, compiled) * compiled
    return 0 if shape.parts == 1 else shape.parts * padded * rows


@triton.jit(do_not_specialize=["rows", "padded"])
def _sum_kernel(
    part_ptr,  # float32[PARTS, padded, rows]
    bias_ptr,  # bfloat16 or float32[rows], not read unless HAS_BIAS
    out_ptr,  # uint16[num_x, rows], BF16 bits
    rows,  # int32
    padded,  # int32, rows of x for which the sums were made
    PARTS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Add the sums of all parts, in order. Grid (ceil(rows / AT_ONCE), num_x)."""
    row = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    m = tl.program_id(1)
    exists = row < rows
    total = tl.zeros([AT_ONCE], tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(
            part_ptr + (part * padded + m).to(tl.int64) * rows + row, mask=exists, other=0.0
        )
    if HAS_BIAS:
        total += tl.load(bias_ptr + row, mask=exists, other=0.0).to(tl.float32)
    tl.store(out_ptr + m.to(tl.int64) * rows + row, _round(total), mask=exists)


def matmul(
    x: torch.Tensor,
    desc: torch.Tensor,
    cols: int,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    partials: torch.Tensor,
    shape: DotShape | GemvShape,
    form: int | None = None,
) -> None:
    """Write x @ w.T + bias to `out`; allocates nothing and does not wait for the device.

    Args:
        x: BF16 [num_x, cols], contiguous, 1 to 256 rows with bands, else 64 (4 for a GemvShape), aligned to 16 bytes.
        desc: int64 [4] on the device, made by this process, of w; the payload is read only if its seal is right, else
            the result is NaN.
        cols: columns of w; `is_supported(cols)`.
        bias: BF16 or FP32 [rows], or None.
        out: BF16 [num_x, rows], contiguous.
        partials: FP32, at least `num_partials(rows, num_x, shape)` elements; overwritten.
        shape: how the kernel is launched.
        form: PLAIN, PATCHED or PERMUTED; None for PERMUTED on an NVIDIA GPU, else PLAIN.

    Raises:
        ValueError: the columns cannot be taken as `shape` says, its rows are not those of its bands, or it does not
            take so many rows of x.
    """
    num_x, rows = out.shape
    if not out.numel():
        return
    if isinstance(shape, DotShape) and cols % shape.cols:
        raise ValueError(f"{cols} columns, taken {shape.cols} at a time; expected a multiple")
    bands = shape if isinstance(shape, DotShape) and shape.has_bands else None
    if bands and bands.rows not in (LOW_BAND * bands.warps, TALL_BAND * bands.warps):
        expected = f"expected {LOW_BAND} or {TALL_BAND} for each"
        raise ValueError(f"{bands.rows} rows for {bands.warps} warps; {expected}")
    if num_x > max_rows(shape):
        raise ValueError(f"{num_x} rows of activations; {shape} takes {max_rows(shape)}")
    is_gpu = is_compiled()
    if form is None:
        form = PERMUTED if is_gpu and torch.version.hip is None else PLAIN
    compiled = compiled_rows(num_x, shape)
    blocks = triton.cdiv(num_x, compiled)  # 1 without bands
    bits = out.view(torch.uint16)
    target = bits if shape.parts == 1 else partials
    salt = descriptor.salt(desc.data_ptr(), fast_layout.size(rows, cols))
    rest = (
        x if bias is None else bias, target, salt, LOW_BYTES, rows, cols, num_x, compiled,
    )  # fmt: skip
    limit: dict[str, int | None] = {}
    if isinstance(shape, DotShape) and form != PLAIN:
        limit["maxnreg"] = max_registers(shape, compiled)
    if bands:
        _bands_kernel[(triton.cdiv(rows, bands.rows) * blocks, bands.parts)](
            desc, x.view(torch.uint32), *rest,
            bands.warps, bands.parts > 1, form, bias is not None, tl.bfloat16 if is_gpu else tl.float32,
            num_warps=bands.warps, **limit,
        )  # fmt: skip
    elif isinstance(shape, DotShape) and shape.stages == 1:
        _ahead_kernel[(triton.cdiv(rows, shape.rows), shape.parts)](
            desc, x.view(torch.uint32), *rest,
            shape.rows, shape.warps, shape.parts > 1, shape.in_order, form, bias is not None,
            tl.bfloat16 if is_gpu else tl.float32, num_warps=shape.warps, **limit,
        )  # fmt: skip
    elif isinstance(shape, DotShape):
        _dot_kernel[(triton.cdiv(rows, shape.rows), shape.parts)](
            desc, x, *rest,
            shape.rows, shape.cols, shape.parts > 1, shape.stages, shape.warps, shape.width, shape.in_order,
            shape.warps >= 4 and _must_wait(x.device), form, bias is not None,
            tl.bfloat16 if is_gpu else tl.float32, num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip
    else:
        _gemv_kernel[(triton.cdiv(rows, shape.turns * shape.warps), shape.parts)](
            desc, x.view(torch.uint32), *rest,
            shape.turns, shape.groups, shape.parts > 1, shape.stages, shape.warps, form, bias is not None, is_gpu,
            num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip
    if shape.parts > 1:
        _sum_kernel[(triton.cdiv(rows, SUM_ROWS), num_x)](
            partials, rest[0], bits, rows, blocks * compiled, shape.parts, SUM_ROWS, bias is not None
        )  # fmt: skip
