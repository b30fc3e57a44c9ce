"""One name per size: older families of models have names of their own in config.json."""

from collections.abc import Mapping
from typing import Any

OTHERS = {
    "num_hidden_layers": ("n_layer", "n_layers"),
    "hidden_size": ("n_embd", "n_embed", "d_model"),
    "num_attention_heads": ("n_head", "n_heads"),
    "num_key_value_heads": ("n_head_kv", "num_kv_heads", "multi_query_group_num"),
    "max_position_embeddings": ("n_positions", "max_seq_len", "seq_length"),
}
# The config says no length (ALiBi, and states without attention), and vLLM takes this one.
WITHOUT_POSITIONS = dict.fromkeys(("bloom", "mamba", "mamba2", "falcon_mamba"), 2048)
WITHOUT_HEADS = ("mamba", "mamba2", "falcon_mamba")  # these have no attention


def with_common_names(entries: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """Return a config in which sizes have their usual names too; what is there already stays as it is."""
    named = dict(entries)
    for usual, others in OTHERS.items():
        if named.get(usual) is None:
            found = [named[other] for other in others if named.get(other) is not None]
            if found:
                named[usual] = found[0]
    if named.get("multi_query") is True and not named.get("new_decoder_architecture"):
        named["num_key_value_heads"] = 1  # Falcon and GPTBigCode, whatever the number of heads says
    if model_type in WITHOUT_POSITIONS and named.get("max_position_embeddings") is None:
        named["max_position_embeddings"] = WITHOUT_POSITIONS[model_type]
    if model_type in WITHOUT_HEADS and named.get("num_attention_heads") is None:
        named["num_attention_heads"] = 1
    layers = named.get("layers_block_type", named.get("hybrid_override_pattern"))
    if named.get("num_hidden_layers") is None and isinstance(layers, (list, str)):
        named["num_hidden_layers"] = len(layers)  # Nemotron-H
    if model_type == "longcat_flash" and named.get("num_layers") is not None:
        # num_hidden_layers counts its attentions, two per transformer block
        named["num_hidden_layers"] = named["num_layers"]
    return named
