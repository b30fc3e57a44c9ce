"""vLLM's product by the BF16 experts of a mixture: the function that its Triton kernel's class calls, and how.

Its `apply` sorts tokens by experts, multiplies twice by this function, and does all else between and after. A copy of
`apply` that calls another function of this name does all of that as vLLM does.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import CodeType, FunctionType
from typing import Any

import torch

BACKEND = "TRITON"  # the name of the kernel whose class does so
NAME = "invoke_fused_moe_triton_kernel"
_ARGUMENTS = (
    "A", "B", "C", "A_scale", "B_scale", "topk_weights", "sorted_token_ids", "expert_ids", "num_tokens_post_padded",
    "mul_routed_weight", "top_k", "config", "compute_type", "use_fp8_w8a8", "use_int8_w8a8", "use_int8_w8a16",
    "use_int4_w4a16", "per_channel_quant", "block_shape", "B_bias",
)  # fmt: skip


def product_of(kernel: type) -> Callable[..., None] | None:
    """Return the function by which `apply` of one of vLLM's classes of experts multiplies; None if it is another."""
    apply = getattr(kernel, "apply", None)
    if not isinstance(apply, FunctionType) or NAME not in _names(apply.__code__):
        return None
    function: Callable[..., None] | None = apply.__globals__.get(NAME)
    if function is None or tuple(inspect.signature(function).parameters) != _ARGUMENTS:
        return None
    return function


def _names(code: CodeType) -> Iterator[str]:
    """Yield the names that a function, and the functions in it, look up."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def apply_with(kernel: type, product: Callable[..., None]) -> Callable[..., Any]:
    """Return a copy of `apply` of a class of experts that multiplies by `product`; it has the arguments of vLLM's."""
    apply: FunctionType = kernel.apply  # type: ignore[attr-defined]
    copy = FunctionType(
        apply.__code__,
        {**apply.__globals__, NAME: product},
        apply.__name__,
        apply.__defaults__,
        apply.__closure__,
    )
    copy.__kwdefaults__ = apply.__kwdefaults__
    return copy


def multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    weights: torch.Tensor | None,
    ids: torch.Tensor | None,
    expert_of_block: torch.Tensor,
    num_padded: torch.Tensor,
    top_k: int,
    config: Mapping[str, Any],
    out: torch.Tensor,
) -> None:
    """Call vLLM's product for BF16 experts [num_experts, rows, cols] as their class calls it.

    Args:
        weights: of the router, [tokens, experts of a token], or None.
        ids, expert_of_block, num_padded: tokens sorted by experts; ids None where each has a block.
        top_k: rows of `out` for each row of `x`.
        out: [tokens, experts of a token, rows].
    """
    from vllm.model_executor.layers.fused_moe import fused_moe
    from vllm.triton_utils import tl

    fused_moe.invoke_fused_moe_triton_kernel(
        x, weight, out, None, None, weights, ids, expert_of_block, num_padded, weights is not None, top_k, dict(config),
        compute_type=tl.bfloat16, use_fp8_w8a8=False, use_int8_w8a8=False, use_int8_w8a16=False, use_int4_w4a16=False,
        per_channel_quant=False, block_shape=None, B_bias=bias,
    )  # fmt: skip


def config_for(
    experts: Any, w13: Sequence[int], w2: Sequence[int], top_k: int, tokens: int
) -> dict[str, Any]:
    """Return the launch parameters that vLLM takes for so many tokens, given its experts' object and their shapes."""
    from vllm.model_executor.layers.fused_moe.fused_moe import try_get_optimal_moe_config

    kind = experts.quant_config.config_name(torch.bfloat16)
    config: dict[str, Any] = try_get_optimal_moe_config(
        tuple(w13), tuple(w2), top_k, kind, tokens, block_shape=experts.block_shape
    )
    return config


def is_sorted(tokens: int, top_k: int, num_experts: int, has_map: bool) -> bool:
    """Return whether vLLM sorts so many tokens by experts; few get a block each (its _prepare_expert_assignment)."""
    return has_map or tokens * top_k * 4 > num_experts


def sizes_of(moe_config: Any) -> tuple[int, int, bool]:
    """Return the number of experts of all ranks, of those of a token, and whether each rank has only some of them."""
    parallel = moe_config.moe_parallel_config
    return moe_config.num_experts, moe_config.experts_per_token, bool(parallel.use_ep)
