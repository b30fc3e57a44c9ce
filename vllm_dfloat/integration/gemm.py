"""The op `vllm_dfloat::linear`: decode a weight into the scratch and run on it the GEMM that BF16 vLLM would run.

One opaque op, because a decode op of its own would be hoisted: Inductor would decode all layers of a block before the
first GEMM.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace

import torch

from vllm_dfloat import ops
from vllm_dfloat.integration import compat
from vllm_dfloat.integration.layouts import BY_NAME
from vllm_dfloat.scratch import scratch

# Names of GEMMs beside the values of vLLM's --linear-backend.
BATCH_INVARIANT = "batch_invariant"
PLAIN = "plain"

Gemm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


@functools.cache
def find_gemm(name: str) -> Gemm:
    """Return the function (x, weight, bias) that BF16 vLLM calls under this name on this platform."""
    from vllm.platforms import current_platform

    if name == PLAIN:
        return torch.nn.functional.linear
    if name == BATCH_INVARIANT:
        return compat.batch_invariant_gemm()
    if current_platform.is_cpu():
        return _cpu_gemm
    gemm = compat.unquantized_gemm(name)
    return lambda x, weight, bias: gemm(None, x, weight, bias)


def _cpu_gemm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Do what BF16 vLLM does on a CPU: pack the weight for oneDNN or sgl, then multiply; other kernels, other bits."""
    # A bias of its own for the packing: 0.28 takes it from the layer, later versions change the layer's.
    layer = _packed_for_cpu(weight, None if bias is None else bias.detach())
    return layer.cpu_linear(x, weight, layer.bias)  # type: ignore[no-any-return]


def _packed_for_cpu(weight: torch.Tensor, bias: torch.Tensor | None) -> SimpleNamespace:
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    layer = SimpleNamespace(weight=weight, bias=bias, cpu_linear=None)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
    return layer


def settle_bias(layer: torch.nn.Module) -> None:
    """Bring a loaded layer's bias into the form that the platform's GEMM wants, as BF16 vLLM does after loading."""
    from vllm.platforms import current_platform

    bias = getattr(layer, "bias", None)
    if current_platform.is_cpu() and bias is not None:
        # One of its kernels wants, and makes it, float32.
        _packed_for_cpu(layer.get_parameter("weight").data, bias)


def linear(
    x: torch.Tensor,
    desc: torch.Tensor,
    bias: torch.Tensor | None,
    rows: int,
    cols: int,
    gemm: str,
    layout: str,
) -> torch.Tensor:
    """Return x @ weight.T + bias for the weight [rows, cols] that `desc` describes.

    Args:
        gemm: name of the GEMM, for `find_gemm`.
        layout: how the weight is held, a name in layouts.py.

    Waits for nothing and allocates nothing but what the GEMM returns, once the scratch is reserved.
    """
    out, status = scratch.take(x.device, ops.padded_numel(rows, cols), compat.lane(x.device))
    BY_NAME[layout].decode(desc, rows, cols, out, status)
    return find_gemm(gemm)(x, out[: rows * cols].view(rows, cols), bias)


def _linear_fake(
    x: torch.Tensor,
    desc: torch.Tensor,
    bias: torch.Tensor | None,
    rows: int,
    cols: int,
    gemm: str,
    layout: str,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], rows))


_library = torch.library.Library("vllm_dfloat", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "linear(Tensor x, Tensor desc, Tensor? bias, int rows, int cols, str gemm, str layout) -> Tensor"
)
for _key in ("CPU", "CUDA"):
    _library.impl("linear", linear, _key)  # type: ignore[no-untyped-call]
torch.library.register_fake("vllm_dfloat::linear", _linear_fake, lib=_library)

op: Callable[..., torch.Tensor] = torch.ops.vllm_dfloat.linear.default
