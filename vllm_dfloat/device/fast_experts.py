"""The experts of a mixture in the fast layout: decode those that got tokens, as experts.py does for the packed one.

A tensor of experts [num_experts, rows, cols] is held as one matrix [num_experts * rows, cols], of which every row takes
the same number of bytes, and so does every expert. What is decoded are whole blocks of rows: those that two experts
share are decoded if either is chosen.
"""

import torch

from vllm_dfloat.codec import fast_decode
from vllm_dfloat.codec.fast_layout import TILE_ROWS
from vllm_dfloat.device import fast_ops
from vllm_dfloat.device.checks import uses_triton


def launch_decode_chosen(
    desc: torch.Tensor,
    num_experts: int,
    rows: int,
    cols: int,
    chosen: torch.Tensor,
    out: torch.Tensor,
    status: torch.Tensor,
) -> None:
    """Decode the chosen experts of a tensor [num_experts, rows, cols], without checks.

    Does not wait for the device, allocates nothing on a GPU.

    Args:
        desc: int64 [4], from the FastWeight of the matrix [num_experts * rows, cols].
        chosen: int32 [num_experts]; 0 for the experts to be left out.
        out: BF16, flat, contiguous, at least num_experts * rows * cols elements, aligned to 16 bytes. Blocks of which
            no expert is chosen are not written.
        status: int32, at least `fast_ops.num_tiles(num_experts * rows, cols)`; those of blocks that are left out stay
            as they were.
    """
    if not num_experts * rows * cols:
        return
    if uses_triton(out.device):
        from vllm_dfloat.kernels.fast_experts import decode_chosen

        decode_chosen(desc, num_experts, rows, cols, chosen, out, status)
        return
    held = fast_ops.fast_at(desc, num_experts * rows, cols)
    bits = out.view(torch.uint16).numpy()[: held.layout.numel].reshape(num_experts * rows, cols)
    for first, end in _runs(chosen, num_experts, rows):
        at = status[first // TILE_ROWS * held.layout.tile_cols :]
        fast_decode.decode_into(held, bits[first:end], at.numpy(), first)


def _runs(chosen: torch.Tensor, num_experts: int, rows: int) -> list[tuple[int, int]]:
    """Return the rows of whole tiles that chosen experts touch: of each run the first row, and the one after it."""
    runs: list[tuple[int, int]] = []
    for expert in chosen[:num_experts].nonzero().view(-1).tolist():
        first = expert * rows // TILE_ROWS * TILE_ROWS
        end = min(num_experts * rows, -(-(expert + 1) * rows // TILE_ROWS) * TILE_ROWS)
        if runs and runs[-1][1] >= first:
            runs[-1] = runs[-1][0], end
        else:
            runs.append((first, end))
    return runs
