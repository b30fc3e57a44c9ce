"""What kind of layer a module of vLLM is, and what of it a checkpoint may leave out."""

from typing import Any

import torch


def is_linear(layer: torch.nn.Module) -> bool:
    """Return whether the layer is one of vLLM's linear layers."""
    from vllm.model_executor.layers.linear import LinearBase

    return isinstance(layer, LinearBase)


def is_vocabulary(layer: torch.nn.Module) -> bool:
    """Return whether the layer is a vocabulary embedding or an LM head."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    return isinstance(layer, VocabParallelEmbedding)


def is_lm_head(layer: torch.nn.Module) -> bool:
    """Return whether the layer is an LM head of its own, not an embedding that serves as one."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    return isinstance(layer, ParallelLMHead)


def is_untied_by_checkpoint(model_config: Any) -> bool:
    """Return whether vLLM has found an LM head in a checkpoint whose config ties it; 0.28 does not look."""
    return bool(getattr(model_config, "word_embeddings_untied_by_checkpoint", False))


def is_draft(model_config: Any) -> bool:
    """Return whether the model is one that makes drafts for another, the target."""
    return str(getattr(model_config, "runner_type", "")) == "draft"


def may_be_the_targets(layer: torch.nn.Module, vllm_config: Any, model_config: Any) -> bool:
    """Return whether vLLM puts the target's embedding or LM head there if the checkpoint of a draft has none.

    It does for EAGLE, MTP and the like, not for whole models that draft; and not for embeddings if there are stages.
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
    """Return what each parameter of routed experts holds of an expert, by the names that checkpoints have for it."""
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
    """Return how many elements of one of its parameters a checkpoint has for an expert on this rank, without padding.

    None: that is not known.
    """
    config = layer.moe_config
    inner = getattr(config, "intermediate_size_per_partition_unpadded", None)
    outer = getattr(config, "hidden_dim_unpadded", None)
    if not inner or not outer or getattr(config, "tp_shard_with_padding", False):
        return None  # the last ranks get less
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
    """Return which experts of the model a layer of routed experts holds, in its order."""
    mapping = getattr(layer, "_expert_map", None)
    if mapping is None:
        return list(range(layer.local_num_experts))
    held = {place: expert for expert, place in enumerate(mapping.tolist()) if place >= 0}
    return [held.get(place, place) for place in range(layer.local_num_experts)]


def may_lack_bias(owner: torch.nn.Module) -> bool:
    """Return whether a model sets a fused bias to zero itself: its checkpoints have it for some projections only."""
    return type(owner).__name__ == "FunAudioChatAudioAttention"
