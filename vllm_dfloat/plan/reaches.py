"""How far back the attention of each layer looks, as vLLM takes it from a config."""

from vllm_dfloat.errors import FormatError, UnsupportedError, shown
from vllm_dfloat.plan.hybrids import HYBRIDS
from vllm_dfloat.plan.kv_cache import EVERYTHING, Reach
from vllm_dfloat.plan.sizes import Sizes

GEMMA3_PATTERN = 6  # every sixth layer of Gemma 3 sees everything, unless its config says otherwise
LLAMA4_PATTERN = 4  # every fourth layer of Llama 4 has no rotary embedding, and sees everything


def layer_reaches(text: Sizes, model_type: str, num_layers: int) -> tuple[Reach, ...]:
    """Return the reach of each layer.

    Raises:
        FormatError: a size is missing or impossible, or a list has another length.
        UnsupportedError: a kind of layer without a cache of keys and values.
    """
    if (
        model_type in HYBRIDS
    ):  # their lists of layers have other words, and their attention has no window
        return (EVERYTHING,) * num_layers
    if model_type == "llama4_text":
        return _llama4(text, num_layers)
    if model_type.startswith("mimo_v2"):
        return _mimo_v2(text, num_layers)
    types = text.entries.get("layer_types")
    if isinstance(types, list):
        _check_types(types, text.where)
    elif types is not None:
        raise FormatError(
            f"{text.where}: layer_types is {shown(types)}; expected a list of names, one per layer."
        )
    is_used = text.flag("use_sliding_window", True)
    if not text.count("sliding_window") or not is_used:
        return (EVERYTHING,) * num_layers
    window = Reach(text.size("sliding_window"))
    if types is None and model_type.startswith("gemma3"):
        every = text.size("sliding_window_pattern", GEMMA3_PATTERN)
        types = ["sliding_attention" if (i + 1) % every else "full" for i in range(num_layers)]
    if types is None and text.flag("use_sliding_window"):
        first = text.count("max_window_layers")
        types = ["full" if i < first else "sliding_attention" for i in range(num_layers)]
    if types is None:
        return (window,) * num_layers
    if len(types) < num_layers:
        raise FormatError(
            f"{text.where}: layer_types is no list of {num_layers} entries, one per layer."
        )
    return tuple(window if kind == "sliding_attention" else EVERYTHING for kind in types[:num_layers])  # fmt: skip


def _check_types(types: list[object], where: str) -> None:
    for kind in types:
        if not isinstance(kind, str) or "attention" not in kind or "linear" in kind:
            raise UnsupportedError(
                f"{where}: layer_types has {shown(kind)}; plan knows layers with a cache of keys and values only. "
                "Start vLLM to see what fits."
            )


def _mimo_v2(text: Sizes, num_layers: int) -> tuple[Reach, ...]:
    pattern = text.integers("hybrid_layer_pattern")  # 1 for layers with a window
    if len(pattern) < num_layers:
        raise FormatError(
            f"{text.where}: hybrid_layer_pattern is no list of {num_layers} entries, one per layer."
        )
    window = Reach(text.size("sliding_window_size", text.count("sliding_window") or None))
    return tuple(window if one == 1 else EVERYTHING for one in pattern[:num_layers])


def _llama4(text: Sizes, num_layers: int) -> tuple[Reach, ...]:
    ropes = text.integers("no_rope_layers") or [
        int((i + 1) % text.size("no_rope_layer_interval", LLAMA4_PATTERN) != 0)
        for i in range(num_layers)
    ]
    if len(ropes) < num_layers:
        raise FormatError(
            f"{text.where}: no_rope_layers is no list of {num_layers} entries, one per layer."
        )
    if not text.count("attention_chunk_size"):
        return (EVERYTHING,) * num_layers
    chunk = Reach(text.size("attention_chunk_size"), is_chunk=True)
    return tuple(chunk if rope else EVERYTHING for rope in ropes[:num_layers])
