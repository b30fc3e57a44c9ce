"""The choice of layout "auto": which matrices are held in the fast layout, and which packed.

Those are fast that every step multiplies by, as many as leave room for the KV cache that was asked for. A matrix gains
in proportion to its size, and so do its bytes; so the order is that of the model, blocks first, then the LM head, then
routed experts, of which a step decodes only some. An embedding that is no head is packed: of it only rows are read.
In modes that multiply without decoding, matrices that these kernels do not take come last: they are decoded anyway.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from vllm_dfloat.codec.fast_layout import TILE_COLS
from vllm_dfloat.plan.kv_cache import KVCache, cdiv
from vllm_dfloat.plan.weights import Weight

HEAD = "lm_head"


@dataclass(frozen=True)
class Candidate:
    """A layer that may be held in the fast layout.

    Attributes:
        name: vLLM's.
        turn: of layers with a smaller number all are chosen first, if there is room.
        more: bytes that it then takes beyond its packed ones.
    """

    name: str
    turn: int
    more: int


def layer_of(weight: Weight) -> str:
    """Return vLLM's name of the layer that a weight belongs to: both tensors of routed experts have one layout."""
    return weight.expert_layer or weight.name


def turn_of(weight: Weight, shape: tuple[int, int], decodes_all: bool) -> int:
    """Return when a weight is chosen: those of transformer blocks first, then heads, then routed experts.

    After all of these, in the same order, those that are decoded where others are multiplied without.

    Args:
        shape: of the part that a rank holds.
        decodes_all: whether the mode decodes every weight.
    """
    turn = 2 if weight.expert_layer else int(weight.layer < 0)
    is_decoded = not decodes_all and _cols(weight, shape) % TILE_COLS > 0
    return 3 + turn if is_decoded else turn


def _cols(weight: Weight, shape: tuple[int, int]) -> int:
    """Return the columns of a weight as it is multiplied: ranks cut an expert's second matrix by its columns."""
    if not weight.num_experts:
        return shape[1]
    is_second = weight.name.endswith(".w2_weight")
    return shape[0] if is_second else weight.cols // weight.num_experts


def layers_of(tensors: Iterable[Candidate]) -> list[Candidate]:
    """Return one per layer, from those of tensors; of both tensors of routed experts the earlier turn counts."""
    layers: dict[str, Candidate] = {}
    for one in tensors:
        known = layers.get(one.name, replace(one, more=0))
        layers[one.name] = Candidate(one.name, min(known.turn, one.turn), known.more + one.more)
    return list(layers.values())


def multiplied(held: Sequence[Weight]) -> list[Weight]:
    """Return the compressed weights of a rank but an embedding that is no LM head: of it only rows are looked up."""
    has_head = any(weight.name.rpartition(".")[2] == HEAD for weight in held)
    return [
        weight for weight in held if weight.is_compressed and not _is_looked_up(weight, has_head)
    ]


def _is_looked_up(weight: Weight, has_head: bool) -> bool:
    if weight.split != "vocab" or weight.name.rpartition(".")[2] == HEAD:
        return False
    return weight.place == "first" or (weight.place == "all" and has_head)


def choose(candidates: Sequence[Candidate], room: int) -> frozenset[str]:
    """Return the names of those that are fast, given `room` bytes beyond what all take packed."""
    chosen = []
    for candidate in sorted(candidates, key=lambda one: one.turn):
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
