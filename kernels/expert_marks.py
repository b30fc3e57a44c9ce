"""Mark the experts that got tokens: flags on the device, from the router's choice on the device.

With few ids, as in a decode step, one program clears the flags and sets them; with many, several programs set flags
that were cleared before. Every program that marks an expert writes the same 1, so the order does not matter.
"""

import torch
import triton
import triton.language as tl

NUM_WARPS = 16
IDS_AT_ONCE = 32 * NUM_WARPS  # one a thread: more would be moved through shared memory
ONE_PROGRAM_IDS = 4 * IDS_AT_ONCE  # more take longer than the launch that clears the flags


@triton.jit
def _mark(ids_ptr, map_ptr, chosen_ptr, place, num_ids, num_global, num_experts, HAS_MAP: tl.constexpr):  # fmt: skip
    """Set the flags of the experts of ids number `place`; ids and mapped ids outside are left out."""
    expert = tl.load(ids_ptr + place, mask=place < num_ids, other=-1).to(tl.int64)
    if HAS_MAP:
        is_known = (expert >= 0) & (expert < num_global)
        expert = tl.load(map_ptr + expert, mask=is_known, other=-1).to(tl.int64)
    is_local = (expert >= 0) & (expert < num_experts)
    tl.store(chosen_ptr + expert, tl.full(place.shape, 1, tl.int32), mask=is_local)


# Sizes are not specialized: another number of tokens must not compile another kernel while requests wait.
@triton.jit(do_not_specialize=["num_ids", "num_global", "num_experts"])
def _mark_kernel(
    ids_ptr,  # int32 or int64[num_ids]
    map_ptr,  # int32[num_global], or anything without HAS_MAP
    chosen_ptr,  # int32[num_experts]
    num_ids,
    num_global,
    num_experts,
    HAS_MAP: tl.constexpr,
    CLEARS: tl.constexpr,  # the grid is one program, and the flags are not cleared yet
    AT_ONCE: tl.constexpr,
):
    """Set the flag of each local expert that occurs among the ids. Grid (ceil(num_ids / AT_ONCE),), or (1,)."""
    lane = tl.arange(0, AT_ONCE)
    if CLEARS:
        first = tl.full([], 0, tl.int32)
        start = first
        while start < num_experts:  # the interpreter of Triton 3.6 takes no range of tensors
            expert = start + lane
            zero = tl.zeros([AT_ONCE], tl.int32)
            tl.store(chosen_ptr + expert, zero, mask=expert < num_experts)
            start += AT_ONCE
        tl.debug_barrier()  # no flag is set by one thread and then cleared by another
        start = first
        while start < num_ids:
            place = start + lane
            _mark(ids_ptr, map_ptr, chosen_ptr, place, num_ids, num_global, num_experts, HAS_MAP)
            start += AT_ONCE
    else:
        place = tl.program_id(0).to(tl.int64) * AT_ONCE + lane
        _mark(ids_ptr, map_ptr, chosen_ptr, place, num_ids, num_global, num_experts, HAS_MAP)


def mark_chosen(ids: torch.Tensor, expert_map: torch.Tensor | None, chosen: torch.Tensor) -> None:
    """Write 1 to `chosen` for each local expert among the ids, 0 for the others; does not wait for the device.

    Args:
        ids: int32 or int64 [n], contiguous; those of no expert count for none.
        expert_map: int32 [global experts], the local number of each or a negative number; or None.
        chosen: int32 [local experts], contiguous.
    """
    num_ids = ids.numel()
    clears = 0 < num_ids <= ONE_PROGRAM_IDS
    if not clears:
        chosen.zero_()
    if num_ids and chosen.numel():
        num_global = 0 if expert_map is None else expert_map.numel()
        _mark_kernel[(1 if clears else triton.cdiv(num_ids, IDS_AT_ONCE),)](
            ids, chosen if expert_map is None else expert_map, chosen,
            num_ids, num_global, chosen.numel(),
            expert_map is not None, clears, IDS_AT_ONCE, num_warps=NUM_WARPS,
        )  # fmt: skip
