"""What each layer of a model caches of a request: keys and values, a latent vector per token, or a state."""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_dfloat.errors import UnsupportedError, shown
from vllm_dfloat.plan.hybrids import HYBRIDS
from vllm_dfloat.plan.kv_cache import EVERYTHING, Pages, Reach, cdiv, latent_page_bytes, page_bytes
from vllm_dfloat.plan.sizes import Sizes
from vllm_dfloat.plan.states import State

# Whose latent attention caches latent vectors; that of MiniCPM3 caches keys and values.
LATENT_MODELS = ("deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe_lite")
EXPANDED_MODELS = ("minicpm3",)
STATES_WITH_PREFIXES = (
    2  # that a request holds where prefixes are cached: at the last block's begin, and now
)


@dataclass(frozen=True)
class Keys:
    """Keys and values of each token, or in place of both a latent vector (multi-head latent attention).

    Attributes:
        kv_heads, head_dim: of keys, and of values.
        latent: numbers of the vector, which every rank holds whole; 0 for keys and values.
        reach: how far back attention looks.
    """

    kv_heads: int
    head_dim: int
    latent: int = 0
    reach: Reach = EVERYTHING

    def page_bytes(self, tp: int, block_size: int, dtype: str) -> int:
        """Return the bytes of a block on each rank."""
        if self.latent:
            return latent_page_bytes(self.latent, block_size, dtype)
        return page_bytes(self.kv_heads, self.head_dim, tp, block_size, dtype)


@dataclass(frozen=True)
class Cached:
    """The cache of one layer; layer: number of its transformer block."""

    layer: int
    kind: Keys | State


def latent_width(text: Sizes, model_type: str) -> int:
    """Return the numbers per token and layer in the cache of multi-head latent attention; 0 for keys and values.

    Raises:
        UnsupportedError: a model whose latent attention is not known.
    """
    if not text.count("kv_lora_rank") or model_type in EXPANDED_MODELS:
        return 0
    if model_type not in LATENT_MODELS or text.count("index_topk"):
        known = ", ".join(LATENT_MODELS + EXPANDED_MODELS)
        raise UnsupportedError(
            f"{text.where}: kv_lora_rank, multi-head latent attention, of model_type {shown(model_type)}; plan knows "
            f"that of {known}. Start vLLM to see what fits."
        )
    return text.size("kv_lora_rank") + text.size("qk_rope_head_dim")


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
    num_layers = len(reaches)
    if hybrid := HYBRIDS.get(model_type):
        state = hybrid.state(text)
        kinds = hybrid.layers_with(text, num_layers)
        caches = []
        for layer, (has_state, has_keys) in enumerate(kinds):
            caches += [
                Cached(layer, _zamba2(text, keys) if model_type == "zamba2" else keys)
            ] * has_keys
            caches += [Cached(layer, state)] * has_state
        return tuple(caches)
    if model_type in EXPANDED_MODELS:
        width = text.size("qk_nope_head_dim") + text.size("qk_rope_head_dim")
        keys = Keys(text.size("num_attention_heads"), width)
    if model_type == "hrm_text":  # every one of its steps through the blocks has a cache of its own
        keys = Keys(text.size("num_attention_heads"), keys.head_dim)
    own = num_layers - min(
        num_layers, text.count("num_kv_shared_layers")
    )  # others use that of an earlier layer
    return tuple(
        Cached(layer, _of_layer(text, model_type, keys, reach, layer))
        for layer, reach in enumerate(reaches[:own])
    )


def _zamba2(text: Sizes, keys: Keys) -> Keys:
    width = 2 * text.size("hidden_size") // text.size("num_attention_heads")
    return Keys(keys.kv_heads, text.size("attention_head_dim", width))


def _of_layer(text: Sizes, model_type: str, keys: Keys, reach: Reach, layer: int) -> Keys:
    if not model_type.startswith("gemma4"):
        return Keys(keys.kv_heads, keys.head_dim, keys.latent, reach)
    given = text.part("per_layer_config")
    if given.entries:
        own = given.part(str(layer))
    elif reach == EVERYTHING:
        own = _global_sizes(text)
    else:
        own = Sizes(text.where, {})
    return Keys(
        own.size("num_key_value_heads", keys.kv_heads),
        own.size("head_dim", keys.head_dim),
        reach=reach,
    )


def _global_sizes(text: Sizes) -> Sizes:
    """Return the sizes of Gemma 4's layers without a window, from a config with its older names."""
    entries = {"head_dim": text.size("global_head_dim", 512)}
    if text.flag("attention_k_eq_v") and text.count("num_global_key_value_heads"):
        entries["num_key_value_heads"] = text.size("num_global_key_value_heads")
    return Sizes(text.where, entries)


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
