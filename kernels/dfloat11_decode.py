"""Decode a unit of an official DFloat11 file on the GPU, a block of 4096 stream bytes per program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_dfloat.dfloat11.format import BLOCK_BYTES, BLOCK_GAP_BYTES
from vllm_dfloat.kernels.configs import config_of
from vllm_dfloat.kernels.dfloat11_block import decode_block


def decode(
    stream: torch.Tensor,
    sign_mantissa: torch.Tensor,
    tables: torch.Tensor,
    positions: torch.Tensor,
    gaps: torch.Tensor,
    out: torch.Tensor,
    status: torch.Tensor,
) -> None:
    """Write the weights of a unit to `out` and a status word per block to `status`.

    If `status` has fewer words than there are blocks, only the first blocks are decoded. Sets every word of `status`
    and does not wait for the device; the caller looks for a word other than STATUS_OK.
    If the status of a block is not STATUS_OK, its part of `out` may be unwritten or wrong.

    Args:
        stream: uint8 [n_bytes], the unit's encoded_exponent.
        sign_mantissa: uint8 [N].
        tables: int32 [R - 1, 256], from dfloat11/tables.py.
        positions: int64 [B + 1], first weight of each block of 4096 stream bytes, then N.
        gaps: uint8 [320 * B].
        out: bfloat16 (or int16 bits) [N], contiguous.
        status: int32 [1 to B].

    Raises:
        ValueError: a tensor's dtype or size does not fit the others (checked before the launch).
    """
    num_blocks = triton.cdiv(stream.numel(), BLOCK_BYTES)
    _check("stream", stream, torch.uint8, stream.numel())
    _check("sign_mantissa", sign_mantissa, torch.uint8, sign_mantissa.numel())
    _check("tables", tables, torch.int32, 256 * max(1, tables.numel() // 256))
    _check("positions", positions, torch.int64, num_blocks + 1)
    _check("gaps", gaps, torch.uint8, BLOCK_GAP_BYTES * num_blocks)
    _check("out", out, out.dtype, sign_mantissa.numel())
    _check("status", status, torch.int32, min(max(status.numel(), 1), num_blocks))
    if out.element_size() != 2:
        raise ValueError(f"out: {out.dtype}; bfloat16 or another 16-bit type is expected")
    _decode_dfloat11_kernel[(status.numel(),)](
        stream,
        sign_mantissa,
        tables,
        positions,
        gaps,
        out.view(torch.int16),
        status,
        stream.numel(),
        sign_mantissa.numel(),
        num_blocks,
        tables.numel() // 256,
        num_warps=config_of(out.device).dfloat11_num_warps,
    )


def _check(name: str, tensor: torch.Tensor, dtype: torch.dtype, numel: int) -> None:
    if tensor.dtype != dtype or tensor.numel() != numel or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: {tensor.dtype} {list(tensor.shape)}; contiguous {dtype} with {numel} "
            "elements is expected"
        )


# Sizes are not specialized: one compiled kernel serves units of all sizes.
@triton.jit(do_not_specialize=["num_bytes", "num_weights", "num_blocks", "num_rows"])
def _decode_dfloat11_kernel(
    stream_ptr,  # uint8[num_bytes]             codes, most significant bit first
    sign_mantissa_ptr,  # uint8[num_weights]    bit 7 sign, bits 6..0 mantissa
    tables_ptr,  # int32[num_rows * 256]        0, symbol | length << 8, or pointer | row
    positions_ptr,  # int64[num_blocks + 1]     first weight of each block
    gaps_ptr,  # uint8[320 * num_blocks]        5 bits per window
    out_ptr,  # int16[num_weights]              BF16 bits
    status_ptr,  # int32[num_blocks]            STATUS_OK or a sum of STATUS_* bits
    num_bytes,
    num_weights,
    num_blocks,
    num_rows,
):
    """Decode one block per program; grid (at most num_blocks,). Reads its bytes and one byte per weight, writes two."""
    block = tl.program_id(0).to(tl.int64)
    decode_block(
        stream_ptr, sign_mantissa_ptr, tables_ptr, positions_ptr, gaps_ptr, out_ptr, status_ptr,
        num_bytes, num_weights, num_blocks.to(tl.int64), num_rows, block, 0, num_weights,
    )  # fmt: skip
