"""An Inductor pattern that fuses additions into compressed layers on a GPU, as Inductor does for BF16 vLLM's matmuls.

Inductor fuses an addition to the result of `aten.mm`, for example of a residual stream, into the GEMM (`addmm` in
torch/_inductor/fx_passes/post_grad.py), unless all users of the sum are pointwise. The sum is then rounded once, not
twice. Inductor does not know that our op is a matmul, so this module adds a pattern with the same conditions. It
matters for models that add in BF16 to a linear layer without a bias (Nemotron, StableLM); most add in float32, in a
norm.
"""

import functools
from typing import Any

import torch

from vllm_dfloat.integration.layers import linear_op
from vllm_dfloat.integration.seam.names import logger


@functools.cache
def install() -> None:
    """Register the pattern, once per process. If Inductor's internals have changed, log the consequence in one line."""
    try:
        _install()
    except Exception as error:
        logger.warning(
            "dfloat11: torch %s: no addition can be taken into compressed layers as Inductor does it in BF16 vLLM "
            "(%s: %s); compiled models that add to a linear layer without a bias may answer otherwise than compiled "
            "BF16 vLLM in the last bits. Use --enforce-eager for equal answers",
            torch.__version__,
            type(error).__name__,
            error,
        )


def _install() -> None:
    from torch._inductor.fx_passes import post_grad
    from torch._inductor.pattern_matcher import CallFunction, KeywordArg, register_graph_pattern

    no_bias = None
    rest = map(KeywordArg, ("tables", "sizes", "gemm", "layout"))
    product = CallFunction(linear_op.op, KeywordArg("x"), KeywordArg("desc"), no_bias, *rest)
    for operands in ((product, KeywordArg("inp")), (KeywordArg("inp"), product)):
        register_graph_pattern(
            CallFunction(torch.ops.aten.add, *operands),
            pass_dict=post_grad.pass_patterns[2],
            extra_check=_is_taken_in,
        )(_take_in)


def _is_taken_in(match: Any) -> bool:
    """Return whether Inductor would fuse the addition into BF16 vLLM's matmul on this device."""
    from torch._inductor.fx_passes import post_grad
    from torch._inductor.utils import is_gpu
    from torch._prims_common import is_expandable_to

    given = match.kwargs
    inp, x = given["inp"], given["x"].meta["val"]
    rows, _, fused_rows, *_ = given["sizes"]
    value = inp.meta.get("val") if isinstance(inp, torch.fx.Node) else None
    return bool(
        isinstance(value, torch.Tensor)
        and is_gpu(value.device.type)
        and value.dtype == x.dtype
        and x.dim() == 2
        and is_expandable_to(value.shape, (x.shape[0], rows))
        and fused_rows == 0
        and linear_op.is_traced_as_matmul(given["gemm"])
        and not post_grad.should_prefer_unfused_addmm(match)  # type: ignore[no-untyped-call]
    )


def _take_in(match: Any, **given: Any) -> None:
    """Replace the two nodes by one op with the addend as its bias, which is equal to addmm."""
    literals = [given[name] for name in ("sizes", "gemm", "layout")]
    tensors = [given[name] for name in ("inp", "x", "desc", "tables") if given[name] is not None]

    def alone(inp: Any, x: Any, desc: Any) -> Any:
        return linear_op.op(x, desc, inp, None, *literals)

    def in_group(inp: Any, x: Any, desc: Any, tables: Any) -> Any:
        return linear_op.op(x, desc, inp, tables, *literals)

    match.replace_by_example(alone if len(tensors) == 3 else in_group, tensors)
