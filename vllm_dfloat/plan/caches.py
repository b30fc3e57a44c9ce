"""What each layer of a model caches of a request: keys and values, a latent vector per token, or a state."""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.plan.hybrids import HYBRIDS, Hybrid
from vllm_dfloat.plan.keys import IndexerKeys, Keys
from vllm_dfloat.plan.kv_cache import Pages, Reach, cdiv
from vllm_dfloat.plan.latent_caches import EXPANDED_MODELS, has_indexer, indexer_keys
from vllm_dfloat.plan.layer_keys import keys_of_layer
from vllm_dfloat.plan.sizes import Sizes
from vllm_dfloat.plan.states import State

STATES_WITH_PREFIXES = (
    2  # that a request holds where prefixes are cached: at the last block's begin, and now
)
LATENT_ALIGNMENT = (
    128  # tokens per block are a multiple of it where latent vectors and states share a pool
)
ATTENTIONS_PER_BLOCK = {"longcat_flash": 2}


@dataclass(frozen=True)
class Cached:
    """The cache of one layer; layer: number of its transformer block."""

    layer: int
    kind: Keys | IndexerKeys | State


def layer_caches(
    text: Sizes, model_type: str, keys: Keys, reaches: Sequence[Reach]
) -> tuple[Cached, ...]:
    """Return the caches of all layers, in vLLM's order.

    Args:
        keys: as the config's usual entries say.
        reaches: of each transformer block.

    Raises:
        FormatError: a size is missing or impossible.
        UnsupportedError: a kind of layer that is not known.
    """
    keys = _keys_of_family(text, model_type, keys)
    if hybrid := HYBRIDS.get(model_type):
        return _hybrid_caches(text, hybrid, keys, len(reaches))
    # The last blocks may use those of an earlier one.
    own = len(reaches) - min(len(reaches), text.count("num_kv_shared_layers"))
    per_block = ATTENTIONS_PER_BLOCK.get(model_type, 1)
    caches = []
    for layer, reach in enumerate(reaches[:own]):
        if keys.is_sparse and has_indexer(text, layer):
            caches.append(Cached(layer, indexer_keys(text)))
        kind = keys_of_layer(text, model_type, keys, reach, layer)
        caches += [Cached(layer, kind)] * per_block
    return tuple(caches)


def _keys_of_family(text: Sizes, model_type: str, keys: Keys) -> Keys:
    """Return the keys and values of a family whose entries mean something else than usual."""
    if model_type in EXPANDED_MODELS:
        width = text.size("qk_nope_head_dim") + text.size("qk_rope_head_dim")
        return Keys(text.size("num_attention_heads"), width)
    if model_type == "hrm_text":  # every one of its steps through the blocks has a cache of its own
        return Keys(text.size("num_attention_heads"), keys.head_dim)
    if model_type == "zamba2":
        width = 2 * text.size("hidden_size") // text.size("num_attention_heads")
        return Keys(keys.kv_heads, text.size("attention_head_dim", width))
    return keys


def _hybrid_caches(text: Sizes, hybrid: Hybrid, keys: Keys, num_layers: int) -> tuple[Cached, ...]:
    state = hybrid.state(text)
    caches = []
    for layer, (has_state, has_keys) in enumerate(hybrid.layers_with(text, num_layers)):
        caches += [Cached(layer, keys)] * has_keys
        caches += [Cached(layer, state)] * has_state
    return tuple(caches)


def pages_of_rank(
    caches: Sequence[Cached], tp: int, block_size: int, dtype: str, state_dtype: str, prefix_caching: bool
) -> list[Pages]:  # fmt: skip
    """Return the layers' caches as each of `tp` ranks holds them.

    Where a model has both, a block has so many tokens that the page of a layer with keys and values holds a state, and
    a state takes such a page.

    Args:
        block_size: tokens per block of a model without states.
        dtype, state_dtype: --kv-cache-dtype and --mamba-ssm-cache-dtype.

    Raises:
        UnsupportedError: the ranks cannot share a layer's cache, or a dtype is not known.
    """
    keys = [one.kind for one in caches if isinstance(one.kind, Keys)]
    states = {
        one.kind: one.kind.num_bytes(tp, state_dtype)
        for one in caches
        if isinstance(one.kind, State)
    }
    padded, held = 0, 1
    if keys and states:
        token = keys[0].page_bytes(tp, 1, dtype)
        if keys[0].latent:
            block_size = max(block_size, LATENT_ALIGNMENT)
        block_size *= cdiv(max(states.values()), block_size * token)
        padded, held = token * block_size, STATES_WITH_PREFIXES if prefix_caching else 1
    pages = [
        Pages(one.layer, max(padded, states[one.kind]), block_size, states=held)
        if isinstance(one.kind, State)
        else Pages(
            one.layer, one.kind.page_bytes(tp, block_size, dtype), block_size, one.kind.reach
        )
        for one in caches
    ]
    if not any(one.page_bytes for one in pages):
        raise UnsupportedError(
            "no layer has keys and values or a state to cache; plan knows no such model. Start vLLM to see what fits."
        )
    return pages
