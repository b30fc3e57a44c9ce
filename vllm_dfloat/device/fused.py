"""The bridge to the fused kernels: multiply a few rows of activations by a packed weight without decoding it to memory.

Only Triton does this; on a CPU it runs in Triton's interpreter, for tests. A GEMM on the decoded weight adds in another
order, so the bits of the result may differ from its bits; kernels/packed_matmul.py derives a bound on the error.
"""

from collections.abc import Hashable

import torch

from vllm_dfloat.codec.decode import check_status
from vllm_dfloat.device import ops
from vllm_dfloat.device.checks import check_desc, check_tensor, require_triton
from vllm_dfloat.errors import UnsupportedError


def max_rows(device: torch.device, rows: int, cols: int) -> int:
    """Return the largest number of rows of activations for which `matmul` is used for a weight [rows, cols].

    0 for never.

    It is a launch parameter of the device (kernels/configs.py); without Triton, as on a CPU, nothing is fused.
    """
    if not ops.uses_triton(device):
        return 0
    from vllm_dfloat.kernels import configs
    from vllm_dfloat.kernels import packed_matmul as matmul

    most = min(matmul.MAX_ROWS, configs.config_of(device).max_fused_rows(rows))
    return most if matmul.is_supported(cols) else 0


def compiled_for(rows: int) -> list[int]:
    """One row count per kernel variant used up to `rows`."""
    from vllm_dfloat.kernels.packed_matmul import compiled_rows

    return list({compiled_rows(num_x): num_x for num_x in range(1, rows + 1)}.values())


def variants(device: torch.device, rows: int, cols: int, most: int) -> dict[Hashable, int]:
    """Return the kernels that up to `most` rows of activations need: their compile-time sizes, and a row count."""
    from vllm_dfloat.kernels.packed_matmul_parts import num_segments

    return {(num_segments(cols), num_x): num_x for num_x in compiled_for(most)}


def partials(device: torch.device, rows: int, cols: int, num_x: int) -> int:
    """Return how many FP32 numbers of scratch `launch_matmul` uses for up to num_x rows of activations."""
    from vllm_dfloat.kernels import packed_matmul as kernels

    return kernels.num_partials(ops.num_tiles(rows, cols), cols, num_x)


def matmul(
    x: torch.Tensor,
    desc: torch.Tensor,
    rows: int,
    cols: int,
    bias: torch.Tensor | None = None,
    scratch: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return x @ w.T + bias, BF16 [num_x, rows], for the packed weight w [rows, cols] that `desc` describes.

    Does not wait for the device. Allocates nothing but the result if `scratch` is given and `x` is contiguous and
    aligned to 16 bytes; another `x` is copied.

    Args:
        x: BF16 [num_x, cols], 1 to 4 rows, on the device of `desc`.
        desc: int64 [4], from a PackedWeight.
        rows, cols: its shape.
        bias: BF16 or FP32 [rows], or None.
        scratch: BF16 [>= padded_numel(rows, cols)] and int32 [>= num_tiles(rows, cols)], both overwritten; afterwards
            the second holds a status per tile, 0 or a sum of STATUS_* bits.

    Raises:
        DeviceError: Triton is missing, or cannot run on the device.
        UnsupportedError: a dtype, shape or device that the kernels do not take.
    """
    require_triton(x.device)
    _check(x, desc, rows, cols, bias)
    if scratch is None:
        scratch = _scratch(rows, cols, x.device)
    else:
        numel, tiles = ops.padded_numel(rows, cols), ops.num_tiles(rows, cols)
        check_tensor("fused: scratch[0]", scratch[0], torch.bfloat16, numel, x.device, 16)
        check_tensor("fused: scratch[1]", scratch[1], torch.int32, tiles, x.device)
    return launch_matmul(x, desc, rows, cols, bias, scratch)


def launch_matmul(
    x: torch.Tensor,
    desc: torch.Tensor,
    rows: int,
    cols: int,
    bias: torch.Tensor | None,
    scratch: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Do what `matmul` does without its checks: for forward passes, whose tensors vLLM and the scratch arena made."""
    from vllm_dfloat.kernels import packed_matmul as kernels

    x = aligned(x)
    num_x, num_tiles = x.shape[0], ops.num_tiles(rows, cols)
    out = torch.empty(num_x, rows, dtype=torch.bfloat16, device=x.device)
    memory, status = scratch
    partials = memory.view(torch.float32)[: kernels.num_partials(num_tiles, cols, num_x)]
    kernels.matmul(x, desc, bias, cols, out, partials, status)
    return out


def aligned(x: torch.Tensor) -> torch.Tensor:
    """Return activations that are contiguous and aligned to 16 bytes: `x` itself if it is so.

    For a misaligned slice Triton would compile another kernel, while requests wait.
    """
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def multiply(
    packed: ops.PackedWeight, x: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return what `matmul` returns, and check every tile's status and all bytes of the weight.

    Raises:
        FormatError: the payload or the descriptor changed after encoding.
        DeviceError, UnsupportedError: as `matmul`.
    """
    packed.check_descriptor()
    scratch = _scratch(packed.rows, packed.cols, packed.desc.device)
    scratch[1].fill_(-1)
    out = matmul(x, packed.desc, packed.rows, packed.cols, bias, scratch)
    check_status(scratch[1].cpu().numpy(), packed.name)
    packed.check_payload()
    return out


def _scratch(rows: int, cols: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    memory = torch.empty(ops.padded_numel(rows, cols), dtype=torch.bfloat16, device=device)
    return memory, torch.empty(ops.num_tiles(rows, cols), dtype=torch.int32, device=device)


def _check(
    x: torch.Tensor, desc: torch.Tensor, rows: int, cols: int, bias: torch.Tensor | None
) -> None:
    from vllm_dfloat.kernels import packed_matmul as kernels

    check_desc("fused", desc)
    check_rows(x, desc, cols, kernels.MAX_ROWS)
    check_bias(bias, x, rows)
    if not kernels.is_supported(cols):
        raise UnsupportedError(
            f"weight [{rows}, {cols}]; the fused kernels take multiples of 8 columns, 688 to 2**26 - 8. "
            "Decode the weight and use a GEMM."
        )


def check_rows(x: torch.Tensor, desc: torch.Tensor, cols: int, most: int) -> None:
    """Raise UnsupportedError unless `x` are 1 to `most` rows of activations for a weight of `cols` columns."""
    found = f"activations {x.dtype} {list(x.shape)} on {x.device}"
    if x.dtype != torch.bfloat16 or x.dim() != 2 or x.shape[1] != cols or x.device != desc.device:
        raise UnsupportedError(
            f"{found}; expected BF16 [1 to {most}, {cols}] on {desc.device}. Convert or move them."
        )
    if not 1 <= x.shape[0] <= most:
        raise UnsupportedError(
            f"{found}; the fused kernels multiply 1 to {most} rows. Decode the weight and use a GEMM."
        )


def check_bias(bias: torch.Tensor | None, x: torch.Tensor, rows: int) -> None:
    """Raise UnsupportedError unless a bias, if there is one, has `rows` elements and lies with the activations."""
    kinds = (torch.bfloat16, torch.float32)
    if bias is not None and (
        bias.dtype not in kinds
        or bias.shape != (rows,)
        or bias.device != x.device
        or not bias.is_contiguous()
    ):
        found = f"bias {bias.dtype} {list(bias.shape)}"
        found += "" if bias.device == x.device else f" on {bias.device}"
        found += "" if bias.is_contiguous() else f" with strides {list(bias.stride())}"
        raise UnsupportedError(
            f"{found}; expected BF16 or FP32 [{rows}] on {x.device}, contiguous. Convert or move it."
        )
