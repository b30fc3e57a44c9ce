"""The GEMMs by which vLLM multiplies BF16 weights, found as its supported versions choose them."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch


def linear_backend(config: Any | None) -> str:
    """Return the user's --linear-backend, an option since vLLM 0.30; "auto" before."""
    return str(getattr(getattr(config, "kernel_config", None), "linear_backend", "auto"))


def unquantized_gemm(backend: str) -> Callable[..., torch.Tensor]:
    """Return vLLM's GEMM (layer, x, weight, bias) for BF16 weights on this platform."""
    from vllm.model_executor.layers.utils import dispatch_unquantized_gemm

    if inspect.signature(dispatch_unquantized_gemm).parameters:
        return dispatch_unquantized_gemm(backend)  # type: ignore[no-any-return]
    return dispatch_unquantized_gemm()  # type: ignore[no-any-return]


def is_tuned_later(name: str) -> bool:
    """Return whether the code of this GEMM, a value of --linear-backend, is chosen in vLLM's warm-up, after loading.

    FlashInfer is: what was found equal before need not be what is served then.
    """
    return name.startswith("flashinfer")


def is_plain_gemm(gemm: Callable[..., torch.Tensor]) -> bool:
    """Return whether this GEMM of vLLM's for BF16 weights is plain F.linear, which torch.compile sees as a matmul."""
    from vllm.model_executor.layers.utils import default_unquantized_gemm

    return gemm is default_unquantized_gemm


def batch_invariant_gemm() -> Callable[..., torch.Tensor]:
    """Return vLLM's GEMM (x, weight, bias) under VLLM_BATCH_INVARIANT."""
    try:
        from vllm.model_executor.determinism.batch_invariant import linear_batch_invariant
    except ImportError:  # older versions have it here
        from vllm.model_executor.layers.batch_invariant import linear_batch_invariant
    return linear_batch_invariant  # type: ignore[no-any-return]


@functools.cache
def adds_bias_to_rounded() -> bool:
    """Return whether `batch_invariant_gemm` adds the bias after it has rounded the product; 0.28 and 0.30 do."""
    return "bias=bias" not in inspect.getsource(batch_invariant_gemm())


def is_batch_invariant() -> bool:
    """Return whether BF16 vLLM calls `batch_invariant_gemm` in this process."""
    from vllm import envs
    from vllm.platforms import current_platform

    on_gpu = current_platform.is_cuda_alike() or current_platform.is_xpu()
    return bool(on_gpu and envs.VLLM_BATCH_INVARIANT)
