"""Entries that published configs leave out, because they are defaults of Transformers' config classes."""

from collections.abc import Mapping
from typing import Any

# Only entries that a plan needs and that real configs of the family lack; a test compares them with Transformers.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": dict(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        vocab_size=32000, tie_word_embeddings=False,
    ),
    "mistral": dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=32000, sliding_window=4096, tie_word_embeddings=False,
    ),
    "gemma": dict(tie_word_embeddings=True),
    "gemma2": dict(tie_word_embeddings=True),
    "gemma3_text": dict(
        vocab_size=262208, num_attention_heads=8, num_key_value_heads=4, head_dim=256,
        max_position_embeddings=131072, sliding_window=4096, tie_word_embeddings=True,
    ),
    "llama4_text": dict(attention_chunk_size=8192, tie_word_embeddings=False),
    "siglip_vision_model": dict(num_channels=3),
    "clip_vision_model": dict(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        image_size=224, patch_size=32, num_channels=3,
    ),
    "pixtral": dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        patch_size=16, num_channels=3,
    ),
    "llama4_vision_model": dict(num_channels=3),
    "qwen2_vl": dict(
        depth=32, embed_dim=1280, num_heads=16, mlp_ratio=4, in_channels=3, patch_size=14,
        spatial_merge_size=2, temporal_patch_size=2,
    ),
    "qwen2_5_vl": dict(
        depth=32, num_heads=16, in_channels=3, patch_size=14, spatial_merge_size=2, temporal_patch_size=2
    ),
    "qwen3_vl": dict(in_channels=3),
    "qwen3_vl_moe": dict(in_channels=3),
}  # fmt: skip


# Entries that the config of a language model may leave out too; it must have all sizes.
NOT_SIZES = ("sliding_window", "attention_chunk_size", "tie_word_embeddings")


def with_defaults(
    entries: Mapping[str, Any], model_type: str, is_part: bool = True
) -> dict[str, Any]:
    """Return a config with the defaults of entries that it leaves out; an entry that is null stays null.

    Args:
        is_part: whether it is a part of a larger config, such as text_config, which may leave out sizes too.
    """
    defaults = DEFAULTS.get(model_type, {})
    kept = {name: value for name, value in defaults.items() if is_part or name in NOT_SIZES}
    return {**kept, **entries}
