"""The bridge to the product with the fast layout: multiply up to 256 rows of activations without decoding to memory.

The functions are those of the packed layout in fused.py. Only Triton does this; on a CPU it runs in Triton's
interpreter, for tests. The bits may differ from those of a GEMM, which adds in another order; kernels/fast_matmul.py
derives a bound on the error.
"""

import functools
import hashlib
import itertools
import os
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vllm_dfloat.device import fast_ops, ops
from vllm_dfloat.device.checks import check_desc, check_tensor, require_triton
from vllm_dfloat.device.fused import aligned, check_bias, check_rows
from vllm_dfloat.device.scratch import Buffers
from vllm_dfloat.errors import UnsupportedError

if TYPE_CHECKING:
    from vllm_dfloat.kernels.fast_product import DotShape, FastProduct


def max_rows(device: torch.device, rows: int, cols: int) -> int:
    """Return the largest number of rows of activations for which `matmul` is used for a weight [rows, cols].

    It is a launch parameter of the device (kernels/configs.py). 0 for never: without Triton, as on a CPU, and for a
    number of columns that the kernels do not take.
    """
    if not ops.uses_triton(device):
        return 0
    from vllm_dfloat.kernels import fast_matmul as kernels
    from vllm_dfloat.kernels.configs import config_of

    most = min(kernels.MAX_ROWS, config_of(device).fast_product.max_rows(rows))
    return most if kernels.is_supported(cols) else 0


def max_rows_in_order(device: torch.device, rows: int, cols: int) -> int:
    """Return the largest number of rows of activations that `launch_in_order` takes; 0 for never, as `max_rows`."""
    if not max_rows(device, rows, cols):
        return 0
    from vllm_dfloat.kernels.configs import config_of

    return config_of(device).fast_product.max_rows_in_order(rows)


def variants(device: torch.device, rows: int, cols: int, most: int) -> dict[Hashable, int]:
    """Return the kernels that up to `most` rows of activations need: their compile-time sizes, and a row count."""
    from vllm_dfloat.kernels import fast_matmul as kernels
    from vllm_dfloat.kernels.configs import config_of

    found: dict[Hashable, int] = {}
    for num_x in range(1, most + 1):
        shape = config_of(device).fast_product.launch_shape(rows, cols, num_x)
        found[shape, kernels.compiled_rows(num_x, shape)] = num_x
    return found


def partials(device: torch.device, rows: int, cols: int, num_x: int) -> int:
    """Return how many FP32 numbers of scratch `launch_matmul` uses for up to num_x rows of activations."""
    from vllm_dfloat.kernels.configs import config_of

    return _most_partials(config_of(device).fast_product, rows, cols, num_x)


@functools.cache
def _most_partials(config: "FastProduct", rows: int, cols: int, num_x: int) -> int:
    from vllm_dfloat.kernels import fast_matmul as kernels

    counts = range(1, min(num_x, config.max_rows(rows)) + 1)  # beyond it: decode, then GEMM
    shapes = [config.launch_shape(rows, cols, count) for count in counts]
    return max(map(kernels.num_partials, itertools.repeat(rows), counts, shapes), default=0)


def matmul(
    x: torch.Tensor,
    desc: torch.Tensor,
    rows: int,
    cols: int,
    bias: torch.Tensor | None = None,
    scratch: Buffers | None = None,
) -> torch.Tensor:
    """Return x @ w.T + bias, BF16 [num_x, rows], for the weight w [rows, cols] that `desc` describes.

    Does not wait for the device. Allocates nothing but the result if `scratch` is given and `x` is contiguous and
    aligned to 16 bytes; another `x` is copied.

    Args:
        x: BF16 [num_x, cols], on the device of `desc`; 1 row or more, up to what kernels/configs.py has for the device.
        desc: int64 [4], from a FastWeight. If it was changed, the result is NaN.
        rows, cols: its shape.
        bias: BF16 or FP32 [rows], or None.
        scratch: BF16 [>= fast_ops.scratch_numel(rows, cols)], overwritten, and any status words.

    Raises:
        DeviceError: Triton is missing, or cannot run on the device.
        UnsupportedError: a dtype, shape or device that the kernels do not take.
    """
    from vllm_dfloat.kernels import fast_matmul as kernels
    from vllm_dfloat.kernels.configs import config_of

    require_triton(x.device)
    check_desc("fast_fused", desc)
    check_rows(x, desc, cols, config_of(x.device).fast_product.max_rows(rows))
    check_bias(bias, x, rows)
    if not kernels.is_supported(cols):
        raise UnsupportedError(
            f"weight [{rows}, {cols}]; the kernels take multiples of 128 columns, below 2**23. Decode the weight and "
            "use a GEMM."
        )
    numel = fast_ops.scratch_numel(rows, cols)
    if scratch is None:
        memory = torch.empty(numel, dtype=torch.bfloat16, device=x.device)
        scratch = memory, torch.empty(0, dtype=torch.int32, device=x.device)
    check_tensor("fast_fused: scratch[0]", scratch[0], torch.bfloat16, numel, x.device, 16)
    return launch_matmul(x, desc, rows, cols, bias, scratch)


def launch_matmul(
    x: torch.Tensor,
    desc: torch.Tensor,
    rows: int,
    cols: int,
    bias: torch.Tensor | None,
    scratch: Buffers,
) -> torch.Tensor:
    """Do what `matmul` does without its checks: for forward passes, whose tensors vLLM and the scratch arena made."""
    from vllm_dfloat.kernels import fast_matmul as kernels
    from vllm_dfloat.kernels.configs import config_of

    num_x = x.shape[0]
    shape = config_of(x.device).fast_product.launch_shape(rows, cols, num_x)
    partials = scratch[0].view(torch.float32)[: kernels.num_partials(rows, num_x, shape)]
    out = torch.empty(num_x, rows, dtype=torch.bfloat16, device=x.device)
    kernels.matmul(aligned(x), desc, cols, bias, out, partials, shape)
    return out


def launch_in_order(
    x: torch.Tensor,
    desc: torch.Tensor,
    rows: int,
    cols: int,
    bias: torch.Tensor | None,
    scratch: Buffers,
) -> torch.Tensor:
    """Do what `launch_matmul` does, in the order in which a plain kernel of Triton adds; leaves the scratch alone.

    The order is that of the columns, 16 at a time, with one FP32 sum, to which the bias is added before it is rounded.
    """
    from vllm_dfloat.kernels import fast_matmul as kernels

    out = torch.empty(x.shape[0], rows, dtype=torch.bfloat16, device=x.device)
    shape = _in_order_shape(x.device, rows, cols, x.shape[0])
    kernels.matmul(aligned(x), desc, cols, bias, out, scratch[0].view(torch.float32), shape)
    return out


def variants_in_order(device: torch.device, rows: int, cols: int, most: int) -> dict[Hashable, int]:
    """Return what `variants` does, for `launch_in_order`."""
    from vllm_dfloat.kernels import fast_matmul as kernels

    found: dict[Hashable, int] = {}
    for num_x in range(1, most + 1):
        shape = _in_order_shape(device, rows, cols, num_x)
        found[shape, kernels.compiled_rows(num_x, shape)] = num_x
    return found


def facts_in_order(device: torch.device, rows: int, cols: int) -> dict[str, Any]:
    """Return, as JSON, what the bits of `launch_in_order` depend on beside shape, device and libraries."""
    most = max_rows_in_order(device, rows, cols)
    return facts_of_kernels() | {
        "launched": repr(list(variants_in_order(device, rows, cols, most).items())),
    }


def facts_of_kernels(*others: str) -> dict[str, Any]:
    """Return, as JSON, which Triton compiles which kernels in order; `others` are modules of kernels beside these."""
    from vllm_dfloat.kernels import fast_matmul

    variables = {name: value for name, value in os.environ.items() if name.startswith("TRITON_")}
    return {
        "triton": fast_matmul.TRITON_VERSION,
        "of triton": {k: v for k, v in sorted(variables.items()) if not k.endswith("_DIR")},
        "kernels": _digest_of_kernels(*others),
    }


@functools.cache
def _digest_of_kernels(*others: str) -> str:
    from vllm_dfloat.kernels import fast_matmul

    folder = Path(fast_matmul.__file__).parent
    names = (
        "fast_matmul", "fast_matmul_dot", "fast_matmul_ahead", "fast_matmul_bands", "fast_matmul_in_order",
        "fast_escapes", "fast_lane_escapes", "fast_planes", "fast_product", "tiles", *others,
    )  # fmt: skip
    texts = [(folder / f"{name}.py").read_bytes() for name in names]
    return hashlib.sha256(b"".join(texts)).hexdigest()[:32]


def _in_order_shape(device: torch.device, rows: int, cols: int, num_x: int) -> "DotShape":
    from vllm_dfloat.kernels.configs import config_of
    from vllm_dfloat.kernels.tiles import is_compiled

    product = config_of(device).fast_product
    most_warps = 1 if torch.version.hip else 2  # with more, registers spill on AMD GPUs
    return product.in_order_shape(rows, cols, num_x, is_compiled(), most_warps)
