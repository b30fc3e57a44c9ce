"""Multiply tokens by their experts, a tensor of experts in the fast layout; decoded weights stay in registers.

    y[t, n] = (sum over k of x[t / top_k, k] * w[e, n, k], + bias[e, n]) * weight[t]     for token t and its expert e

It takes what vLLM's own kernel for BF16 experts takes (fused_moe_kernel): tokens sorted by experts in blocks, or, where
there are few, a block for each. A program is one warp with 16 rows of one expert and up to ROWS tokens of a block; the
sum is that of fast_matmul_ahead.py, in the order of the columns. So are its error bound and its promise that a token's
result does not depend on others.
"""

import torch
import triton
import triton.language as tl

from vllm_dfloat.codec import descriptor, fast_layout
from vllm_dfloat.kernels.fast_escapes import PERMUTED, PLAIN, _round
from vllm_dfloat.kernels.fast_matmul_ahead import _no_sum
from vllm_dfloat.kernels.fast_matmul_in_order import _sum_in_order
from vllm_dfloat.kernels.fast_planes import LOW_BYTES, _open
from vllm_dfloat.kernels.routed import Routed
from vllm_dfloat.kernels.tiles import is_compiled

BLOCK_ROWS = 16  # rows of an expert per program; those of a tile are a multiple
MAX_TOKENS = 16  # of a program; a block of more takes several
_BLOCK_ROWS = tl.constexpr(BLOCK_ROWS)
_TILE_COLS = tl.constexpr(fast_layout.TILE_COLS)


def is_supported(rows: int, cols: int) -> bool:
    """Return whether `multiply` takes experts [rows, cols]: rows in multiples of 16, columns of 128."""
    return rows > 0 and cols > 0 and rows % BLOCK_ROWS == 0 and cols % fast_layout.TILE_COLS == 0


def compiled_tokens(most: int) -> int:
    """Return for how many tokens of a block the kernel is compiled that multiplies up to `most`."""
    return 8 if most <= 8 else MAX_TOKENS


@triton.jit
def _tokens_of(
    ids_ptr, padded_ptr, block_at, part, block, num_out, ROWS: tl.constexpr, IS_SORTED: tl.constexpr
):
    """Return the tokens of part `part` of a block, int32 [ROWS]; num_out or more where there is none."""
    place = part * ROWS + tl.arange(0, ROWS)
    if IS_SORTED:
        exists = (place < block) & (block_at * block + place < tl.load(padded_ptr))
        return tl.load(ids_ptr + block_at * block + place, mask=exists, other=num_out)
    else:
        return tl.where(place == 0, block_at, num_out)


@triton.jit
def _exist(token, num_out):
    return (token >= 0) & (token < num_out)


@triton.jit(
    do_not_specialize=["salt", "low_bytes", "num_experts", "rows", "num_out", "block", "top_k"]
)
def _experts_kernel(
    desc_ptr,  # int64[4], see codec/descriptor.py; num_entries and base as sizes
    x_ptr,  # uint32[num_out / top_k, cols / 2], pairs of BF16
    bias_ptr,  # bfloat16 or float32[num_experts, rows], not read unless HAS_BIAS
    weight_ptr,  # bfloat16 or float32[num_out], not read unless HAS_WEIGHTS
    ids_ptr,  # int32[blocks * block], tokens by experts, or num_out and more; not read unless IS_SORTED
    padded_ptr,  # int32[1], of these; not read unless IS_SORTED
    expert_ptr,  # int32 or int64[blocks], the expert of a block; negative for none
    out_ptr,  # uint16[num_out, rows], BF16 bits
    salt,  # int64, of the seal
    low_bytes,  # int32, 0x00FF00FF, see fast_planes.py
    num_experts,  # int32
    rows,  # int32, of one expert, a multiple of 16
    cols,  # int32, a multiple of 128
    num_out,  # int32
    block,  # int32, tokens of a block
    top_k,  # int32
    ROWS: tl.constexpr,
    IS_SORTED: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FORM: tl.constexpr,
    OPERAND: tl.constexpr,  # as in fast_matmul_ahead.py
):
    """Grid (rows / 16, blocks * ceil(block / ROWS)); one warp. Tokens of blocks without an expert get zeros."""
    parts = tl.cdiv(block, ROWS)
    block_at = tl.program_id(1) // parts
    part = tl.program_id(1) % parts
    token = _tokens_of(ids_ptr, padded_ptr, block_at, part, block, num_out, ROWS, IS_SORTED)
    exists = _exist(token, num_out)
    if tl.max(exists.to(tl.int32), axis=0) == 0:
        return
    number = tl.load(expert_ptr + block_at)  # of 64 bits, it may be one of no expert
    expert = tl.minimum(tl.maximum(number, -1), num_experts).to(tl.int32)
    total = num_experts * rows
    is_sound, low, high, starts_ptr, entries_ptr, base4, num_entries = _open(
        desc_ptr, salt, total, cols
    )
    is_sound = is_sound & (expert < num_experts)
    end = tl.where(is_sound & (expert >= 0), cols // _TILE_COLS, 0)
    first = expert * rows + tl.program_id(0) * _BLOCK_ROWS
    acc = _sum_in_order(
        _no_sum(is_sound | (expert < 0), ROWS, _BLOCK_ROWS), low, high, starts_ptr, entries_ptr, base4, num_entries,
        low_bytes.to(tl.uint32), first, total, x_ptr, tl.where(exists, token // top_k, 0), cols, end,
        _BLOCK_ROWS, 1, FORM, OPERAND, False,
    )  # fmt: skip
    row = tl.program_id(0) * _BLOCK_ROWS + tl.arange(0, _BLOCK_ROWS)[:, None]
    # Read once more: kept all the while, they would take registers.
    token = _tokens_of(ids_ptr, padded_ptr, block_at, part, block, num_out, ROWS, IS_SORTED)
    exists = _exist(token, num_out)
    if HAS_BIAS:
        at = tl.minimum(tl.maximum(expert, 0), num_experts - 1).to(tl.int64) * rows + row
        bias = tl.load(bias_ptr + at).to(tl.float32)
        acc += tl.where(expert < 0, 0.0, bias)
    if HAS_WEIGHTS:
        weight = tl.load(weight_ptr + token, mask=exists, other=0.0).to(tl.float32)
        acc *= tl.where(expert < 0, 0.0, weight)[None, :]
    out = out_ptr + token[None, :].to(tl.int64) * rows + row
    tl.store(out, _round(acc), mask=exists[None, :])


def multiply(
    x: torch.Tensor,
    desc: torch.Tensor,
    num_experts: int,
    cols: int,
    routed: Routed,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    form: int | None = None,
) -> None:
    """Write to `out` what the tokens' experts make of `x`; allocates nothing and does not wait for the device.

    Args:
        x: BF16 [num_out / top_k, cols], contiguous, aligned to 16 bytes.
        desc: int64 [4] on the device, made by this process, of the matrix [num_experts * rows, cols]; the payload is
            read only if its seal is right, else the result is NaN.
        num_experts, cols: of the tensor [num_experts, rows, cols]; `is_supported(rows, cols)`.
        routed: whose rows are which expert's.
        bias: BF16 or FP32 [num_experts, rows], contiguous, or None.
        out: BF16 [num_out, rows], contiguous. Rows in no block are not written.
        form: PLAIN, PATCHED or PERMUTED; None for PERMUTED on an NVIDIA GPU, else PLAIN.
    """
    num_out, rows = out.shape
    if not out.numel():
        return
    is_gpu = is_compiled()
    if form is None:
        form = PERMUTED if is_gpu and torch.version.hip is None else PLAIN
    experts, weights, ids, padded = (
        routed.expert_of_block, routed.weights, routed.ids, routed.num_padded,
    )  # fmt: skip
    # Each block has a token, so there are no more blocks than tokens.
    block, blocks = 1, num_out
    if ids is not None:
        block, blocks = routed.block, min(ids.numel() // routed.block, num_out)
    compiled = compiled_tokens(min(block, routed.num_tokens))
    salt = descriptor.salt(desc.data_ptr(), fast_layout.size(num_experts * rows, cols))
    _experts_kernel[(rows // BLOCK_ROWS, blocks * triton.cdiv(block, compiled))](
        desc, x.view(torch.uint32), x if bias is None else bias, x if weights is None else weights,
        experts if ids is None else ids, experts if padded is None else padded, experts, out.view(torch.uint16),
        salt, LOW_BYTES, num_experts, rows, cols, num_out, block, routed.top_k,
        compiled, ids is not None, weights is not None, bias is not None, form, tl.bfloat16 if is_gpu else tl.float32,
        num_warps=1,
    )  # fmt: skip
