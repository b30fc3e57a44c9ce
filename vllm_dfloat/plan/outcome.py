"""What a way to hold the weights, BF16 or compressed, leaves for the KV cache, and whether vLLM starts with it."""

from collections.abc import Callable
from dataclasses import dataclass

from vllm_dfloat.plan.kv_cache import KVCache
from vllm_dfloat.plan.memory import Rank
from vllm_dfloat.plan.settings import Settings


@dataclass(frozen=True)
class Outcome:
    """The result for one way to hold the weights, BF16 or compressed.

    Attributes:
        kv_bytes: per pipeline stage, the bytes left for the KV cache on each rank; negative if something does not fit.
        num_blocks: KV blocks of the rank with the fewest.
        tokens: KV tokens as vLLM reports them.
        longest: the longest request that fits, up to the model's context; 0 if none does.
        fits: whether vLLM starts and a request of --max-model-len tokens fits; without it, of one token.
    """

    kv_bytes: tuple[int, ...]
    num_blocks: int
    tokens: int
    longest: int
    fits: bool


def bf16(rank: Rank) -> tuple[int, int]:
    """Return the bytes beside the KV cache in BF16, and the peak while loading; 0 for one that is not told."""
    return rank.bf16_on_gpu + rank.overhead, 0


def unproven(rank: Rank) -> tuple[int, int]:
    held = rank.dfloat11_on_gpu + rank.scratch
    return held + rank.unproven_overhead, rank.loading_peak


def proven(rank: Rank) -> tuple[int, int]:
    held = rank.dfloat11_on_gpu + rank.scratch
    return held + rank.overhead, rank.loading_peak


def outcome(
    ranks: list[Rank],
    cache: KVCache,
    settings: Settings,
    context: int,
    needed: Callable[[Rank], tuple[int, int]],
) -> Outcome:
    left, blocks, loads = [], [], True
    for rank in ranks:
        held, peak = needed(rank)
        free = settings.requested - held
        loads &= settings.kv_cache_memory is not None or free > 0
        loads &= peak <= settings.gpu_memory
        if settings.kv_cache_memory is not None:  # which --gpu-memory-utilization does not limit
            free = settings.kv_cache_memory
            loads &= held + free <= settings.gpu_memory
        left.append(free)
        if per_block := cache.block_bytes(rank.layers):
            blocks.append(max(0, left[-1]) // per_block)
    num_blocks = min(blocks)
    if not loads:
        return Outcome(tuple(left), num_blocks, 0, 0, False)
    tokens = cache.capacity(num_blocks, settings.max_model_len or context)
    longest = cache.longest(num_blocks, context)
    return Outcome(
        tuple(left), num_blocks, tokens, longest, longest >= (settings.max_model_len or 1)
    )
