"""A tiny mixture of experts, and its layer of routed experts in a model that vLLM has loaded."""

from pathlib import Path
from typing import Any

import tiny_models
import torch

from vllm_dfloat.integration.layers.method import weights_of
from vllm_dfloat.integration.seam import layer_kinds

NUM_EXPERTS, TOP_K = 8, 2
# Sizes of an expert: tiles of its own; two experts share a tile of w2, and more of them one.
INTERMEDIATE = {"whole tiles": 64, "two experts to a tile": 32}
SMALL = dict(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_attention_heads=2, head_dim=32,
    num_key_value_heads=1, num_hidden_layers=1,
)  # fmt: skip
DFLOAT11: dict[str, Any] = dict(quantization="dfloat11")
FAST: dict[str, Any] = {**DFLOAT11, "additional_config": {"dfloat11": {"layout": "fast"}}}


def save(sizes: str, path: Path, **changes: Any) -> Path:
    """Write a checkpoint with one layer of experts of these sizes into `path`, and return it."""
    own = dict(num_experts_per_tok=TOP_K, moe_intermediate_size=INTERMEDIATE[sizes])
    return tiny_models.save("qwen3_moe", path, num_experts=NUM_EXPERTS, **SMALL, **own, **changes)


def experts_of(model: torch.nn.Module) -> Any:
    return next(layer for layer in model.modules() if layer_kinds.is_experts(layer))


def values(layer: Any) -> list[torch.Tensor]:
    """Return w13 and w2 of a layer, compressed or not, as its kernel wants them."""
    if weights_of(layer):
        return list(layer.quant_method.dequantize_weight(layer))
    return [layer.w13_weight.detach().clone(), layer.w2_weight.detach().clone()]
