"""Checks of devices and tensors for the ops; each error is one sentence."""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vllm_dfloat.errors import DeviceError, UnsupportedError

MIN_CAPABILITY = (8, 0)  # BF16 arithmetic begins with Ampere
_INTERPRETER_ON = ("1", "true", "on", "yes", "y")


def check_device(device: torch.device) -> None:
    """Raise DeviceError, in one sentence, if weights on `device` could not be decoded."""
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise DeviceError(f"device {device}: dfloat11 decodes on CPUs, NVIDIA and AMD GPUs only")
    capability = torch.cuda.get_device_capability(device)
    # ROCm counts otherwise: 9.4 is an MI300.
    if torch.version.hip is None and capability < MIN_CAPABILITY:
        raise DeviceError(
            f"{torch.cuda.get_device_name(device)}: compute capability {capability[0]}.{capability[1]}; "
            "dfloat11 needs 8.0 (Ampere) or newer"
        )
    uses_triton(device)


def uses_triton(device: torch.device) -> bool:
    """Return whether the Triton kernels decode on `device`.

    VLLM_DFLOAT_BACKEND=triton asks for them on a CPU too (in Triton's interpreter), =numba for the CPU decoder.

    Raises:
        DeviceError: Triton is to be used but cannot be imported or run on `device`; numba is asked for on a GPU; or
            the variable has another value.
    """
    backend = os.environ.get("VLLM_DFLOAT_BACKEND", "")
    if backend not in ("", "triton", "numba"):
        raise DeviceError(
            f"VLLM_DFLOAT_BACKEND={backend}: expected triton or numba. Correct or unset it."
        )
    is_gpu = device.type == "cuda"
    if backend == "numba" and is_gpu:
        raise DeviceError(
            f"VLLM_DFLOAT_BACKEND=numba on {device}: the CPU decoder reads no GPU memory; expected triton. Unset it."
        )
    if backend != "triton" and not is_gpu:
        return False
    require_triton(device)
    return True


def require_triton(device: torch.device) -> None:
    """Raise DeviceError if Triton cannot be imported, or could not run on `device`."""
    _import_triton(device)
    if (
        device.type != "cuda"
        and os.environ.get("TRITON_INTERPRET", "").lower() not in _INTERPRETER_ON
    ):
        raise DeviceError(
            f"Triton on {device}: it runs on GPUs, and on CPUs in its interpreter only; set TRITON_INTERPRET=1 "
            "before Python starts, or choose the CPU decoder (VLLM_DFLOAT_BACKEND=numba, or unset)."
        )


@functools.cache
def _import_triton(device: torch.device) -> None:
    """Raise DeviceError if Triton cannot be imported; remember only that it could."""
    with needing_triton(device):
        from vllm_dfloat.kernels import tiles  # noqa: F401  (the smallest module that imports it)


@contextmanager
def needing_triton(device: torch.device, otherwise: str = "") -> Iterator[None]:
    """Raise DeviceError if an import in the block fails, as those of kernels do without Triton.

    Args:
        device: where the kernels are to run, for the message.
        otherwise: what else the user can do, such as ", or compress with --device cpu".
    """
    try:
        yield
    except ImportError as error:
        raise DeviceError(
            f"{device}: Triton cannot be imported ({error}); dfloat11's GPU kernels need it. Install triton{otherwise}."
        ) from error


def check_tensor(
    what: str,
    tensor: torch.Tensor,
    dtype: torch.dtype,
    least: int,
    device: torch.device,
    alignment: int = 1,
) -> None:
    """Check a flat buffer that a kernel gets; does not wait for the device.

    Args:
        what: op and argument, such as "decode: out", for the message.
        least: the smallest number of elements allowed.
        alignment: bytes that its address must be a multiple of.

    Raises:
        UnsupportedError: another dtype or device, not flat and contiguous, too small or misaligned.
    """
    if (
        tensor.dtype == dtype
        and tensor.device == device
        and tensor.dim() == 1
        and tensor.is_contiguous()
        and tensor.numel() >= least
        and tensor.data_ptr() % alignment == 0
    ):
        return
    strides = "" if tensor.is_contiguous() else f" with strides {list(tensor.stride())}"
    if tensor.device.type == "meta" or tensor.data_ptr() % alignment == 0:
        place = f"on {tensor.device}"
    else:
        place = f"on {tensor.device} at {tensor.data_ptr():#x}"
    aligned = "" if alignment == 1 else f", aligned to {alignment} bytes"
    raise UnsupportedError(
        f"{what}: {tensor.dtype} {list(tensor.shape)}{strides} {place}; expected {dtype} [at least {least}] on "
        f"{device}, contiguous{aligned}. Convert, move or allocate it so."
    )


def check_desc(what: str, desc: torch.Tensor) -> None:
    """Raise UnsupportedError if `desc` does not have the dtype and shape of a descriptor; its values are not read."""
    if desc.dtype != torch.int64 or desc.shape != (4,) or not desc.is_contiguous():
        raise UnsupportedError(
            f"{what}: descriptor {desc.dtype} {list(desc.shape)}; expected torch.int64 [4]. "
            "Give that of a PackedWeight."
        )


def check_ids(what: str, ids: torch.Tensor, device: torch.device) -> None:
    """Raise UnsupportedError if `ids` are not 1-D integers on `device`; their values are not read."""
    is_integer = ids.dtype in (torch.int64, torch.int32)
    if not is_integer or ids.dim() != 1 or ids.device != device:
        raise UnsupportedError(
            f"{what}: rows {ids.dtype} {list(ids.shape)} on {ids.device}; expected torch.int64 [n] on {device}. "
            "Convert or move them."
        )
