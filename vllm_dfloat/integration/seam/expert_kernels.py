"""vLLM's kernels for the BF16 experts of a mixture: which one a layer has, and what it needs at an update."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Kernels for BF16 experts that read no expert without tokens. Those of FlashInfer are closed; the batched one goes by
# counts of tokens, not by ids.
READ_CHOSEN_EXPERTS_ONLY = ("TRITON", "CPU")
# Kernels whose weights are what the layer's w13_weight and w2_weight hold, on devices that decode.
_COMPRESSIBLE = (
    *READ_CHOSEN_EXPERTS_ONLY,
    "BATCHED_TRITON",
    "FLASHINFER_TRTLLM",
    "FLASHINFER_CUTLASS",
)


def backend_of_experts(method: Any) -> str:
    """Return the name of the kernel that vLLM has chosen for BF16 experts, given their quantization method."""
    return str(getattr(method.unquantized_backend, "name", ""))


def can_compress_experts(backend: str) -> bool:
    """Return whether experts for this kernel can be held compressed."""
    return backend in _COMPRESSIBLE


def routes_by_itself(method: Any) -> bool:
    """Return whether the kernel of BF16 experts takes router logits instead of ids (monolithic, in vLLM's words)."""
    return method.experts_cls is not None and bool(method.experts_cls.is_monolithic())


def experts_of_kernel(method: Any) -> Any:
    """Return the part of a method's kernel that multiplies by the experts, an object of `experts_cls`."""
    return method.moe_kernel.fused_experts


def moves_experts(moe_config: Any) -> bool:
    """Return whether vLLM moves experts between ranks while serving, to balance their load (EPLB)."""
    return bool(moe_config.moe_parallel_config.enable_eplb)


def traces_experts(config: Any | None) -> bool:
    """Return whether vLLM traces the kernel of experts on a CPU; on a GPU it is inside an opaque op."""
    compilation = getattr(config, "compilation_config", None)
    return bool(int(getattr(compilation, "mode", 0) or 0))


def method_of(layer: Any) -> Any:
    """Return a layer's quantization method; of experts under LoRA the one that LoRA has wrapped."""
    return getattr(layer.quant_method, "old_quant_method", layer.quant_method)


def keeps_form_of_experts(layer: Any) -> bool:
    """Return whether the kernel of these unquantized experts keeps the checkpoint's order of the weights.

    Other kernels swap or shuffle the weights into tensors of the same shape.
    """
    backend = getattr(method_of(layer), "unquantized_backend", None)
    return getattr(backend, "name", "") in ("TRITON", "BATCHED_TRITON")


def renew_cpu_kernel(experts: Any) -> None:
    """Make vLLM's CPU kernel pack the weights of an update: an existing kernel assumes that they are packed already."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and getattr(experts.quant_method, "moe_kernel", None) is not None:
        experts.quant_method.moe_kernel = None


def kernel_of_experts(experts: Any) -> dict[str, Any]:
    """Return the attributes of the experts' quantization method that hold vLLM's kernel."""
    names = ("moe_kernel", "moe_quant_config")
    return {
        name: getattr(experts.quant_method, name)
        for name in names
        if hasattr(experts.quant_method, name)
    }


@contextmanager
def plain_names_of_experts(model: torch.nn.Module) -> Iterator[None]:
    """Let experts under LoRA find their weights by a checkpoint's names; vLLM looks for those of an adapter's file."""
    layers: list[Any] = [
        layer for layer in model.modules() if getattr(layer, "lora_base_layer_prefix", "")
    ]
    before = [layer.lora_base_layer_prefix for layer in layers]
    try:
        for layer in layers:
            layer.lora_base_layer_prefix = ""
        yield
    finally:
        for layer, prefix in zip(layers, before, strict=True):
            layer.lora_base_layer_prefix = prefix
