"""Keys and values where layers differ, by family: layers with a window, or of another kind, have heads of their own."""

from dataclasses import replace

from vllm_dfloat.plan.keys import Keys
from vllm_dfloat.plan.kv_cache import EVERYTHING, Reach
from vllm_dfloat.plan.sizes import Sizes


def keys_of_layer(text: Sizes, model_type: str, keys: Keys, reach: Reach, layer: int) -> Keys:
    """Return what a layer of attention caches.

    Args:
        keys: as the config's usual entries say.

    Raises:
        FormatError: a size is missing or impossible.
    """
    if model_type.startswith("gemma4"):
        keys = _gemma4(text, keys, reach, layer)
    elif model_type.startswith("mimo_v2"):
        keys = _mimo_v2(text, keys, reach)
    elif model_type == "step3p5":
        keys = _step3p5(text, keys, layer)
    return replace(keys, reach=reach)


def _gemma4(text: Sizes, keys: Keys, reach: Reach, layer: int) -> Keys:
    given = text.part("per_layer_config")
    own = Sizes(text.where, {})
    if given.entries:
        own = given.part(str(layer))
    elif reach == EVERYTHING:
        own = _global_sizes(text)
    return Keys(own.size("num_key_value_heads", keys.kv_heads), own.size("head_dim", keys.head_dim))


def _global_sizes(text: Sizes) -> Sizes:
    """Return the sizes of Gemma 4's layers without a window, from a config with its older names."""
    entries = {"head_dim": text.size("global_head_dim", 512)}
    if text.flag("attention_k_eq_v") and text.count("num_global_key_value_heads"):
        entries["num_key_value_heads"] = text.size("num_global_key_value_heads")
    return Sizes(text.where, entries)


def _mimo_v2(text: Sizes, keys: Keys, reach: Reach) -> Keys:
    """Return keys and values of MiMo V2, whose widths differ."""
    if reach == EVERYTHING:
        return replace(keys, value_dim=text.count("v_head_dim"))
    return Keys(
        text.size("swa_num_key_value_heads"),
        text.size("swa_head_dim"),
        value_dim=text.count("swa_v_head_dim"),
    )


def _step3p5(text: Sizes, keys: Keys, layer: int) -> Keys:
    keys = Keys(text.size("num_attention_groups"), keys.head_dim)
    own = text.part("attention_other_setting")
    types = text.entries.get("layer_types") or ()
    if not own.entries or not types or types[layer] != own.text("attention_type"):
        return keys
    return Keys(own.size("num_attention_groups"), own.size("head_dim"))
