"""Models that no plan is made for: vLLM does not serve them, or what their layers cache is not known here."""

from vllm_dfloat.errors import UnsupportedError, shown
from vllm_dfloat.plan.hybrids import HYBRIDS
from vllm_dfloat.plan.sizes import Sizes

# Models with states -> the last vLLM that served them, as vLLM says itself; this package needs a newer one.
LAST_SERVED = {
    "BambaForCausalLM": "0.23.0",
    "MiniMaxForCausalLM": "0.23.0",
    "MiniMaxM1ForCausalLM": "0.23.0",
    "MiniMaxText01ForCausalLM": "0.23.0",
    "MiniMaxVL01ForConditionalGeneration": "0.23.0",
    "Plamo2ForCausalLM": "0.26.0",
}
# Beginnings of model types whose layers cache more than keys and values, in pages of vLLM's own for each of them.
OTHER_CACHES = {
    "deepseek_v4": "compressed keys and values",
    "dots3_note": "compressed keys and values",
    "glm5_next": "compressed keys and values",
    "hy_v4": "compressed keys and values",
    "inkling": "short convolutions beside windows",
    "minimax_m3": "blocks that an indexer chooses",
    "qwen4_exp": "states of several sizes",
}
OTHER_STATES = (  # prefixes of entries that models with other kinds of layers have
    "mamba", "ssm_", "state_size", "linear_num_", "linear_attn", "attn_layer_", "hybrid_", "full_attention_interval",
)  # fmt: skip


def refuse_unserved(architecture: str, where: str) -> None:
    """Refuse a model that no vLLM serves which this package works with.

    Raises:
        UnsupportedError: it is one.
    """
    if last := LAST_SERVED.get(architecture):
        raise UnsupportedError(
            f"{where}: {architecture}, which vLLM {last} was the last to serve; vllm-dfloat needs vLLM 0.28 or "
            "newer, so there is nothing to plan. Choose another model."
        )


def refuse_other_caches(text: Sizes, model_type: str) -> None:
    """Refuse models with a cache that is not known.

    Raises:
        UnsupportedError: it is one.
    """
    for prefix, what in OTHER_CACHES.items():
        if model_type.startswith(prefix):
            raise UnsupportedError(
                f"{text.where}: model_type {shown(model_type)} caches {what}, which plan does not count. "
                "Start vLLM to see what fits."
            )
    if model_type in HYBRIDS:
        return
    entries = text.entries
    told = [name for name in entries if name.startswith(OTHER_STATES) and entries[name]]
    if model_type.startswith("mimo_v2"):
        told = [name for name in told if name != "hybrid_layer_pattern"]  # of layers with a window
    found = next(iter(told), None)
    types = entries.get("attn_type_list")  # 1 is attention
    if types and not (
        isinstance(types, list) and all(type(one) is int and one == 1 for one in types)
    ):
        found = "attn_type_list"
    if text.flag("is_encoder_decoder"):
        found = "is_encoder_decoder"
    if found:
        raise UnsupportedError(
            f"{text.where}: {found} says that not every layer has a cache of keys and values, and plan knows no other. "
            "Start vLLM to see what fits."
        )  # fmt: skip
