"""The choice of layout "auto": which matrices are held in the fast layout, and which packed.

Those are fast that every step multiplies by, as many as leave room for the KV cache that was asked for. A matrix gains
in proportion to its size, and so do its bytes; so the order is that of the model, blocks first, then the LM head. An
embedding that is no head is packed: of it only rows are read. So are routed experts, in either layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_dfloat.plan.kv_cache import KVCache, cdiv
from vllm_dfloat.plan.weights import Weight


@dataclass(frozen=True)
class Candidate:
    """A matrix that may be held in the fast layout.

    Attributes:
        name: vLLM's, of its layer.
        in_block: whether it belongs to a transformer block.
        more: bytes that it then takes beyond its packed ones.
    """

    name: str
    in_block: bool
    more: int


def is_multiplied(weight: Weight) -> bool:
    """Return whether every step multiplies by a compressed weight: not by an embedding that is no LM head."""
    is_embedding = weight.split == "vocab" and weight.place == "first"
    return weight.is_compressed and not weight.expert_layer and not is_embedding


def choose(candidates: Sequence[Candidate], room: int) -> frozenset[str]:
    """Return the names of those that are fast, given `room` bytes beyond what all take packed."""
    chosen = []
    for candidate in sorted(candidates, key=lambda one: not one.in_block):
        if candidate.more <= room:
            room -= candidate.more
            chosen.append(candidate.name)
    return frozenset(chosen)


def bytes_for(tokens: int, cache: KVCache, layers: range, length: int) -> int:
    """Return the bytes of KV cache on a rank that hold `tokens` tokens, as vLLM counts them.

    Args:
        layers: those that the rank runs.
        length: tokens per request, --max-model-len.
    """
    num_blocks = cdiv(tokens * cache.blocks_per_request(length), length) + 1  # one is vLLM's own
    return num_blocks * cache.block_bytes(layers)
