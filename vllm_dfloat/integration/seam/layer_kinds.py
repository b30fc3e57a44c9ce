"""Kinds of vLLM's layers, and the parts that a checkpoint may lack."""

from typing import Any

import torch


def is_linear(layer: torch.nn.Module) -> bool:
    """Return whether the layer is one of vLLM's linear layers."""
    from vllm.model_executor.layers.linear import LinearBase

    return isinstance(layer, LinearBase)


def shape_of_linear(layer: Any) -> tuple[int, int] | None:
    """Return [rows, cols] of a linear layer's weight on this rank, None for layers of other kinds."""
    if not is_linear(layer):
        return None
    rows = getattr(layer, "output_size_per_partition", layer.output_size)
    return rows, getattr(layer, "input_size_per_partition", layer.input_size)


def is_vocabulary(layer: torch.nn.Module) -> bool:
    """Return whether the layer is a vocabulary embedding or an LM head."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    return isinstance(layer, VocabParallelEmbedding)


def is_lm_head(layer: torch.nn.Module) -> bool:
    """Return whether the layer is a separate LM head, not an embedding that also serves as one."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    return isinstance(layer, ParallelLMHead)


def is_left_out(layer: torch.nn.Module) -> bool:
    """Return whether this is what vLLM puts in the place of a layer that it leaves out, such as a pooling model's head.

    It passes on the attributes of that layer, `quant_method` too. The layer is on the meta device and is never loaded.
    """
    from vllm.model_executor.models.utils import StageMissingLayer

    return isinstance(layer, StageMissingLayer)


def is_untied_by_checkpoint(model_config: Any) -> bool:
    """Return whether vLLM has untied an LM head because the checkpoint stores one; 0.28 never does."""
    return bool(getattr(model_config, "word_embeddings_untied_by_checkpoint", False))


def other_dtype_of_head(model_config: Any) -> torch.dtype | None:
    """Return the dtype in which vLLM multiplies by the LM head, None if it is the model's.

    vLLM then reads the head's weight. None too for pooling models, whose head_dtype is that of other layers.
    """
    if model_config is None or str(getattr(model_config, "runner_type", "")) == "pooling":
        return None
    dtype: torch.dtype | None = getattr(model_config, "head_dtype", None)
    return None if dtype == model_config.dtype else dtype


def may_be_lm_head(model_config: Any) -> bool:
    """Return whether the embedding may be the LM head too, by the model's config."""
    return bool(getattr(getattr(model_config, "hf_text_config", None), "tie_word_embeddings", True))


def is_draft(model_config: Any) -> bool:
    """Return whether the model is a draft model of speculative decoding; the model it drafts for is the target."""
    return str(getattr(model_config, "runner_type", "")) == "draft"


def may_be_the_targets(layer: torch.nn.Module, vllm_config: Any, model_config: Any) -> bool:
    """Return whether vLLM uses the target's embedding or LM head for this layer if a draft's checkpoint has none.

    It does so for EAGLE, MTP and similar drafts, not for method "draft_model"; with pipeline stages only for LM heads.
    """
    method = getattr(getattr(vllm_config, "speculative_config", None), "method", None)
    if not is_draft(model_config) or method == "draft_model" or not is_vocabulary(layer):
        return False
    parallel = getattr(vllm_config, "parallel_config", None)
    return is_lm_head(layer) or getattr(parallel, "pipeline_parallel_size", 1) == 1


def is_experts(layer: torch.nn.Module) -> bool:
    """Return whether the layer holds the routed experts of a mixture."""
    return any(cls.__name__ == "RoutedExperts" for cls in type(layer).__mro__)


def expert_matrices(layer: Any) -> dict[str, list[str]]:
    """Return, for each parameter of routed experts, the checkpoint's names of the matrices it holds per expert."""
    gate, up, down = (
        str(getattr(layer, f"ckpt_{kind}_proj_name", None) or f"{kind}_proj")
        for kind in ("gate", "up", "down")
    )
    is_gated = getattr(layer.moe_config, "is_act_and_mul", True)
    return {
        "w13_weight": [gate, up] if is_gated else [gate],
        "w2_weight": [down],
        "w13_bias": [f"{gate} bias"],
        "w2_bias": [f"{down} bias"],
    }


def numel_of_expert(layer: Any, name: str) -> int | None:
    """Return the elements, without padding, that a checkpoint has for one parameter of one expert on this rank.

    None if that is not known.
    """
    config = layer.moe_config
    inner = getattr(config, "intermediate_size_per_partition_unpadded", None)
    outer = getattr(config, "hidden_dim_unpadded", None)
    if not inner or not outer or getattr(config, "tp_shard_with_padding", False):
        return None  # the last ranks get fewer
    gates = 2 if getattr(config, "is_act_and_mul", True) else 1
    sizes = {
        "w13_weight": gates * inner * outer,
        "w2_weight": inner * outer,
        "w13_bias": gates * inner,
        "w2_bias": outer,
    }
    return sizes.get(name)


def has_padded_experts(layer: Any) -> bool:
    """Return whether vLLM pads the inner dimension of routed experts for a kernel."""
    config = layer.moe_config
    inner = getattr(config, "intermediate_size_per_partition_unpadded", None)
    return bool(inner != config.intermediate_size_per_partition)


def local_experts(layer: Any) -> list[int]:
    """Return the global numbers of the experts that a layer of routed experts holds, in the layer's order."""
    mapping = getattr(layer, "_expert_map", None)
    if mapping is None:
        return list(range(layer.local_num_experts))
    held = {place: expert for expert, place in enumerate(mapping.tolist()) if place >= 0}
    return [held.get(place, place) for place in range(layer.local_num_experts)]


def may_lack_bias(owner: torch.nn.Module) -> bool:
    """Return whether the model's code zeroes a fused bias: its checkpoints have biases for some projections only."""
    return type(owner).__name__ == "FunAudioChatAudioAttention"
