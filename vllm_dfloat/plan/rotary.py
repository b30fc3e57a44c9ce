"""Tables of sines and cosines for rotary embeddings.

vLLM makes them for every position of the model's context, however short --max-model-len is.
"""

from collections.abc import Iterable

from vllm_dfloat.plan.config import ModelConfig
from vllm_dfloat.plan.hybrids import HYBRIDS
from vllm_dfloat.plan.sizes import Sizes

ITEMSIZE = 2
MROPE_FACTOR = 4  # times the context: the positions of Qwen2-VL and Qwen2.5-VL
_MROPE_TYPES = ("qwen2_vl", "qwen2_5_vl")


def rotary_bytes(config: ModelConfig, layers: Iterable[int]) -> int:
    """Return the bytes of the tables that these layers need; layers of one kind share one.

    Raises:
        FormatError: the config's scaling is not a known one.
    """
    tables = {_kind(config, layer) for layer in layers}
    return sum(
        ITEMSIZE * _positions(config, kind) * _width(config, kind) for kind in tables if kind
    )


def _kind(config: ModelConfig, layer: int) -> str | None:
    """Return "full_attention" or "sliding_attention" if they rotate differently; None for no rotation."""
    model_type = config.text("model_type")
    hybrid = HYBRIDS.get(model_type)
    if hybrid and not hybrid.has_rotary:
        return None
    reach = config.reaches[layer]
    if model_type == "llama4_text":
        return "full_attention" if reach.is_chunk else None
    is_split = model_type.startswith("gemma3") or "full_attention" in _given(config).entries
    return "sliding_attention" if is_split and reach.tokens else "full_attention"


def _given(config: ModelConfig) -> Sizes:
    """Return the config's rope_parameters, or rope_scaling, their older name."""
    parameters = config.part("rope_parameters")
    return parameters if parameters.entries else config.part("rope_scaling")


def _rope(config: ModelConfig, kind: str) -> Sizes:
    given = _given(config)
    if kind in given.entries:
        return given.part(kind)
    is_local = kind == "sliding_attention"  # of Gemma 3, which scales the other layers only
    return Sizes(given.where, {}) if is_local else given


def _positions(config: ModelConfig, kind: str) -> int:
    trained = config.size("max_position_embeddings")
    rope = _rope(config, kind)
    scaling = rope.text("rope_type", rope.text("type", "default"))
    factor = rope.ratio("factor", 1.0)
    if scaling in ("yarn", "deepseek_yarn"):
        trained = int(rope.size("original_max_position_embeddings", trained) * factor)
    elif scaling in ("linear", "ntk"):
        trained = int(trained * factor)
    elif scaling in ("longrope", "su"):  # a table each for short and for long contexts
        trained += config.size("original_max_position_embeddings", trained)
    if "mrope_section" in rope.entries and config.whole.text("model_type") in _MROPE_TYPES:
        trained *= MROPE_FACTOR
    return trained


def _width(config: ModelConfig, kind: str) -> int:
    if config.latent:
        return config.size("qk_rope_head_dim")
    share = config.ratio("partial_rotary_factor", 1.0)
    share *= _rope(config, kind).ratio("partial_rotary_factor", 1.0)
    return int(config.head_dim * share)
