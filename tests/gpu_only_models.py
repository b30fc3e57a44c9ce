"""Stand-ins for the parts of vLLM that need a GPU, so that a CPU can build models which it cannot run.

Nothing here computes: what such a model holds and caches follows from its modules alone.
"""

import os
from typing import Any

import torch


class Nothing:
    """In place of streams and events of CUDA."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        pass


def start() -> None:
    """Put the stand-ins into vLLM, in this process."""
    os.environ["VLLM_KIMI_K3_GEMM_AR"] = "0"  # which imports CUDA's compiler
    torch.cuda.Stream = torch.cuda.Event = Nothing  # type: ignore[misc,assignment]
    from vllm.model_executor.layers.mamba.gdn import olmo_gdn_linear_attn
    from vllm.platforms.cpu import CpuPlatform

    olmo_gdn_linear_attn.set_triton_allocator = lambda device: None  # type: ignore[assignment]
    own = CpuPlatform.get_attn_backend_cls.__func__

    def with_sparse_attention(
        cls: type, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        if attn_selector_config.use_sparse:
            return f"{__name__}.sparse_attention"
        return str(own(cls, selected_backend, attn_selector_config, num_heads))

    CpuPlatform.get_attn_backend_cls = classmethod(with_sparse_attention)  # type: ignore[assignment]


def __getattr__(name: str) -> Any:
    """Return the attention backend that is chosen above: vLLM's for latent attention, without its kernels."""
    if name != "sparse_attention":
        raise AttributeError(name)
    from vllm.v1.attention.backends.mla import cpu_mla

    class Kernels(cpu_mla.CPUMLAImpl):
        def __init__(self, *args: Any, **settings: Any) -> None:
            pass

    class SparseAttention(cpu_mla.CPUMLABackend):
        @staticmethod
        def get_impl_cls() -> Any:
            return Kernels

    return SparseAttention
