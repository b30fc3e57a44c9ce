"""The bridge to products with experts in the fast layout: multiply a few tokens by theirs without decoding to memory.

As fast_fused.py for one matrix. The arguments are those of vLLM's own kernel for BF16 experts; the order is that of
`fast_fused.launch_in_order`. Only Triton does this; on a CPU it runs in Triton's interpreter, for tests.
"""

from collections.abc import Hashable
from typing import Any

import torch

from vllm_dfloat.device import ops
from vllm_dfloat.device.checks import check_desc, check_tensor, require_triton
from vllm_dfloat.device.fast_fused import facts_of_kernels
from vllm_dfloat.device.fused import aligned
from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.kernels.routed import Routed as Routed  # for callers


def max_tokens(device: torch.device, num_experts: int, top_k: int, rows: int, cols: int) -> int:
    """Return the largest number of tokens for which `launch` is used for experts [rows, cols].

    With so many, an expert has as many tokens on average as a launch parameter of the device says
    (kernels/configs.py). 0 for never: without Triton, as on a CPU, and for sizes that the kernel does not take.

    Args:
        num_experts: of all ranks.
        top_k: experts of a token.
    """
    if not ops.uses_triton(device):
        return 0
    from vllm_dfloat.kernels import fast_experts_matmul as kernels
    from vllm_dfloat.kernels.configs import config_of

    most = config_of(device).fast_tokens_per_expert * num_experts // max(top_k, 1)
    return most if kernels.is_supported(rows, cols) else 0


def variants(block: int, most: int) -> dict[Hashable, int]:
    """Return the kernels that up to `most` tokens need in blocks of so many, and for each a number of tokens."""
    from vllm_dfloat.kernels import fast_experts_matmul as kernels

    return {kernels.compiled_tokens(min(block, count)): count for count in range(1, most + 1)}


def facts() -> dict[str, Any]:
    """Return, as JSON, what the bits of `launch` depend on beside shape, variant, device and libraries."""
    return facts_of_kernels("fast_experts_matmul")


def multiply(
    x: torch.Tensor,
    desc: torch.Tensor,
    num_experts: int,
    rows: int,
    cols: int,
    routed: Routed,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Do what `launch` does, after checking the arguments.

    Raises:
        DeviceError: Triton is missing, or cannot run on the device.
        UnsupportedError: a dtype, shape or device that the kernel does not take.
    """
    from vllm_dfloat.kernels import fast_experts_matmul as kernels

    require_triton(x.device)
    check_desc("experts_product", desc)
    device, num_out = x.device, x.shape[0] * routed.top_k
    if not kernels.is_supported(rows, cols):
        raise UnsupportedError(
            f"experts [{num_experts}, {rows}, {cols}]; the kernel takes multiples of 16 rows and of 128 columns. "
            "Decode them and use vLLM's kernel."
        )
    if x.dtype != torch.bfloat16 or x.dim() != 2 or x.shape[1] != cols or device != desc.device:
        raise UnsupportedError(
            f"activations {x.dtype} {list(x.shape)} on {device}; expected BF16 [tokens, {cols}] on {desc.device}. "
            "Convert or move them."
        )
    check_tensor("experts_product: out", out.view(-1), torch.bfloat16, num_out * rows, device)
    places = 0 if routed.ids is None else routed.ids.numel()
    blocks = num_out if routed.ids is None else places // routed.block
    floats, ints = (torch.float32, torch.bfloat16), (torch.int32, torch.int64)
    for name, tensor, kinds, numel in (
        ("ids", routed.ids, ints[:1], places),
        ("num_padded", routed.num_padded, ints[:1], 1),
        ("expert_of_block", routed.expert_of_block, ints, blocks),
        ("weights", routed.weights, floats, num_out),
        ("bias", bias, floats, num_experts * rows),
    ):
        if tensor is not None:
            kind = tensor.dtype if tensor.dtype in kinds else kinds[0]
            check_tensor(f"experts_product: {name}", tensor.view(-1), kind, numel, device)
    launch(x, desc, num_experts, rows, cols, routed, bias, out)


def launch(
    x: torch.Tensor,
    desc: torch.Tensor,
    num_experts: int,
    rows: int,
    cols: int,
    routed: Routed,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Write to `out` the product of each row of activations with its experts; does not wait for the device.

    Row t of `out` is (x[t // top_k] @ expert.T + its bias) * weights[t], added in the order of the columns, 16 at a
    time, in one FP32 sum, and rounded once. Allocates nothing if `x` is contiguous and aligned to 16 bytes.

    Args:
        x: BF16 [m, cols].
        desc: int64 [4], from the FastWeight of the matrix [num_experts * rows, cols]. If it was changed, the result is
            NaN.
        num_experts, rows, cols: shape of the tensor of experts.
        bias: BF16 or FP32 [num_experts, rows], contiguous, or None.
        out: BF16, contiguous, m * top_k * rows elements; rows in no block are not written.
    """
    from vllm_dfloat.kernels import fast_experts_matmul as kernels

    kernels.multiply(aligned(x), desc, num_experts, cols, routed, bias, out.view(-1, rows))
