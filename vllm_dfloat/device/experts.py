"""The bridge for the experts of a mixture: decode those that got tokens, and leave the others alone.

A tensor of experts [num_experts, rows, cols] is packed as one matrix [num_experts * rows, cols] (`ops.pack`), with one
code book and one descriptor. A tile is 2048 weights in the order of the memory, so the tiles of an expert follow from
its number, and only those of chosen experts need to be decoded:

    mark_chosen(topk_ids, expert_map, chosen)                              which local experts got a token
    decode_chosen(desc, num_experts, rows, cols, chosen, out, status)      their tiles, each where it lies in the tensor

Both do not wait for a GPU, and always launch the same kernels: whatever the router chooses, a captured CUDA graph is
right. The flags are read as "not 0"; no value of a flag or id leads out of a tensor. A tile that two experts share is
decoded if either is chosen; none is shared where rows * cols is a multiple of 2048, as it is in nearly all models.
"""

import torch

from vllm_dfloat.codec.decode import decode_tiles_into
from vllm_dfloat.codec.layout import TILE_WEIGHTS
from vllm_dfloat.device import ops
from vllm_dfloat.device.checks import check_desc, check_tensor, uses_triton
from vllm_dfloat.errors import UnsupportedError

STATUS_SKIPPED = -1  # of a tile of experts that were not chosen
_ID_DTYPES = (torch.int32, torch.int64, torch.uint32)


def mark_chosen(
    topk_ids: torch.Tensor, expert_map: torch.Tensor | None, chosen: torch.Tensor
) -> None:
    """Write 1 to `chosen` for each local expert that got a token and 0 for the others; does not wait for the device.

    Args:
        topk_ids: int32, int64 or uint32 of any shape, the experts of each token. Ids of no expert, such as the -1 of
            masked tokens, count for none.
        expert_map: int32 [global experts], the local number of each expert or a negative number where it lies on
            another rank; None if `topk_ids` are local numbers.
        chosen: int32 [local experts].

    Raises:
        UnsupportedError: a tensor of another dtype, shape or device.
    """
    device = chosen.device
    check_tensor("mark_chosen: chosen", chosen, torch.int32, 0, device)
    if expert_map is not None:
        check_tensor("mark_chosen: expert_map", expert_map, torch.int32, 0, device)
    if topk_ids.dtype not in _ID_DTYPES or topk_ids.device != device:
        raise UnsupportedError(
            f"mark_chosen: topk_ids {topk_ids.dtype} on {topk_ids.device}; expected torch.int32, int64 or uint32 on "
            f"{device}. Convert or move them."
        )
    if topk_ids.dtype == torch.uint32:  # ids of over 2**31 are no experts either way
        topk_ids = topk_ids.view(torch.int32)
    ids = topk_ids.reshape(-1)
    if uses_triton(device):
        from vllm_dfloat.kernels.expert_marks import mark_chosen as mark_chosen_triton

        mark_chosen_triton(ids, expert_map, chosen)
        return
    ids = ids.long()
    if expert_map is not None:
        ids = expert_map[ids[(ids >= 0) & (ids < expert_map.numel())]].long()
    chosen.zero_()
    chosen[ids[(ids >= 0) & (ids < chosen.numel())]] = 1


def decode_chosen(
    desc: torch.Tensor,
    num_experts: int,
    rows: int,
    cols: int,
    chosen: torch.Tensor,
    out: torch.Tensor,
    status: torch.Tensor,
) -> None:
    """Decode the chosen experts of a packed tensor [num_experts, rows, cols]; does not wait for the device.

    Args:
        desc: int64 [4], from the PackedWeight of the matrix [num_experts * rows, cols].
        num_experts, rows, cols: shape of the tensor.
        chosen: int32 [num_experts]; 0 for the experts to be left out.
        out: BF16, flat, contiguous, at least `ops.padded_numel(num_experts * rows, cols)` elements, aligned to 16
            bytes. The tiles of experts that are not chosen are not written.
        status: int32, at least `ops.num_tiles(num_experts * rows, cols)`; per tile 0, a sum of STATUS_* bits, or
            STATUS_SKIPPED.

    Raises:
        UnsupportedError: a tensor of another dtype, size, device or alignment.
        FormatError: on a CPU, the descriptor was changed.
    """
    tiles, device = ops.num_tiles(num_experts * rows, cols), desc.device
    check_desc("decode_chosen", desc)
    check_tensor("decode_chosen: chosen", chosen, torch.int32, num_experts, device)
    check_tensor("decode_chosen: out", out, torch.bfloat16, tiles * TILE_WEIGHTS, device, 16)
    check_tensor("decode_chosen: status", status, torch.int32, tiles, device)
    status[:tiles].fill_(STATUS_SKIPPED)
    launch_decode_chosen(desc, num_experts, rows, cols, chosen, out, status)


def launch_decode_chosen(
    desc: torch.Tensor,
    num_experts: int,
    rows: int,
    cols: int,
    chosen: torch.Tensor,
    out: torch.Tensor,
    status: torch.Tensor,
) -> None:
    """Do what `decode_chosen` does without its checks, for forward passes, whose buffers the scratch arena made.

    The status words of tiles that are left out stay as they were.
    """
    if not num_experts * rows * cols:
        return
    if uses_triton(out.device):
        from vllm_dfloat.kernels.expert_decode import decode_chosen as decode_chosen_triton

        decode_chosen_triton(desc, num_experts, rows * cols, chosen, out, status)
        return
    packed = ops.packed_at(desc, num_experts * rows, cols)
    tiles = _tiles_of(chosen, num_experts, rows * cols)
    decode_tiles_into(packed, tiles.numpy(), out.view(torch.uint16).numpy(), status.numpy())


def count_decoded(status: torch.Tensor, num_experts: int, rows: int, cols: int) -> int:
    """Return how many tiles of a tensor have a status other than STATUS_SKIPPED; waits for the device. For tests."""
    return int((status[: ops.num_tiles(num_experts * rows, cols)] != STATUS_SKIPPED).sum())


def _tiles_of(chosen: torch.Tensor, num_experts: int, expert_numel: int) -> torch.Tensor:
    """Return the tiles that the chosen experts touch, int64 [n], ascending, each once."""
    num_tiles = ops.num_tiles(num_experts, expert_numel)
    touched = torch.zeros(num_tiles, dtype=torch.bool, device=chosen.device)
    for expert in chosen[:num_experts].nonzero().view(-1).tolist():
        start = expert * expert_numel
        touched[start // TILE_WEIGHTS : (start + expert_numel - 1) // TILE_WEIGHTS + 1] = True
    return touched.nonzero().view(-1)
