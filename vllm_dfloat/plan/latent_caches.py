"""What multi-head latent attention caches, by family: latent vectors, and keys of the indexer where it is sparse."""

from vllm_dfloat.errors import FormatError, UnsupportedError, shown
from vllm_dfloat.plan.keys import IndexerKeys
from vllm_dfloat.plan.sizes import Sizes

# Whose latent attention caches latent vectors; that of MiniCPM3 caches keys and values.
SPARSE_MODELS = ("deepseek_v32", "glm_moe_dsa")
LATENT_MODELS = (
    "axk1", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_k2", "kimi_linear", "longcat_flash",
    "pangu_ultra_moe", "sarvam_mla", *SPARSE_MODELS,
)  # fmt: skip
EXPANDED_MODELS = ("minicpm3",)


def latent_width(text: Sizes, model_type: str) -> int:
    """Return the numbers per token and layer in the cache of multi-head latent attention; 0 for keys and values.

    Raises:
        UnsupportedError: a model whose latent attention is not known.
    """
    if not text.count("kv_lora_rank") or model_type in EXPANDED_MODELS:
        return 0
    if model_type not in LATENT_MODELS:
        known = ", ".join(LATENT_MODELS + EXPANDED_MODELS)
        raise UnsupportedError(
            f"{text.where}: kv_lora_rank, multi-head latent attention, of model_type {shown(model_type)}; plan knows "
            f"that of {known}. Start vLLM to see what fits."
        )
    if text.count("index_topk") and model_type not in SPARSE_MODELS:
        raise UnsupportedError(
            f"{text.where}: index_topk, sparse latent attention, of model_type {shown(model_type)}; plan knows that of "
            f"{', '.join(SPARSE_MODELS)}. Start vLLM to see what fits."
        )
    return text.size("kv_lora_rank") + text.size("qk_rope_head_dim")


def is_sparse(text: Sizes, model_type: str) -> bool:
    """Return whether attention reads only the tokens that an indexer chooses."""
    return model_type in SPARSE_MODELS and bool(text.count("index_topk"))


def has_indexer(text: Sizes, layer: int) -> bool:
    """Return whether a layer of sparse attention has an indexer; the others take the choice of the one before.

    Raises:
        FormatError: index_topk_pattern is no string.
    """
    pattern = text.entries.get("index_topk_pattern")
    if pattern is None:
        offset, every = (
            text.count("index_skip_topk_offset", 2),
            text.size("index_topk_freq", 1),
        )
        return max(layer - offset + 1, 0) % every == 0
    if not isinstance(pattern, (str, list)):
        raise FormatError(
            f"{text.where}: index_topk_pattern is {shown(pattern)}; expected a string with a letter per layer."
        )
    return layer >= len(pattern) or pattern[layer] != "S"


def indexer_keys(text: Sizes) -> IndexerKeys:
    """Return what an indexer caches.

    Raises:
        FormatError: its size is missing or impossible.
    """
    return IndexerKeys(text.size("index_head_dim"))
