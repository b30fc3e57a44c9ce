"""Kernels of others, measured if they are installed: decoders of dfloat11 and NVIDIA nvCOMP, vLLM's for experts.

No other part of this project installs or imports them.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_dfloat.dfloat11.format import BLOCK_BYTES, BLOCK_WINDOWS
from vllm_dfloat.kernels.routed import Routed

DEFAULT_SHARED_BYTES = 48 * 1024  # a kernel must request more explicitly
MAX_DYNAMIC_SHARED_SIZE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
NVCOMP_ALGORITHMS = ("ANS", "Bitcomp", "Cascaded")


class NotHereError(Exception):
    """A peer cannot be measured here; the message says why."""


class OfficialKernel:
    """The decode kernel that the package dfloat11 ships as PTX, called through the CUDA driver.

    Its arguments: luts, stream, sign_mantissa, output_positions, gaps, output; numbers of luts, bytes and weights.

    Raises:
        NotHereError: there is no GPU, the package is not installed, or the driver does not take its PTX.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise NotHereError("needs a GPU")
        self._driver = ctypes.CDLL("libcuda.so.1")
        image = ctypes.create_string_buffer(_ptx().read_bytes())
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), image)
        self._call("cuModuleGetFunction", ctypes.byref(self._function), module, b"decode")

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._driver, name)(*arguments)
        if status:
            raise NotHereError(f"{name} of the CUDA driver returned {status}")

    def prepare(self, tensors: dict[str, Any], device: torch.device) -> OfficialLaunch:
        """Return a launch that decodes a unit, given as `encode_unit` returns it."""
        return OfficialLaunch(self, tensors, device)


class OfficialLaunch:
    """One unit on the device, ready to be decoded again and again."""

    def __init__(self, kernel: OfficialKernel, tensors: dict[str, Any], device: torch.device):
        self._kernel, self._device = kernel, device
        stored = tensors["output_positions"].view("<u4").astype(np.int64)
        positions = np.append(stored, tensors["sign_mantissa"].size)  # may be one entry short
        fields = ("luts", "encoded_exponent", "sign_mantissa", "output_positions", "gaps")
        # The kernel reads a few bytes past the last gap and position.
        self._held = [_padded(tensors[field], device) for field in fields]
        num_bytes = tensors["encoded_exponent"].size
        self._grid = -(-num_bytes // BLOCK_BYTES)
        self._sizes = [len(tensors["luts"]), num_bytes, tensors["sign_mantissa"].size]
        self._shared = BLOCK_WINDOWS * 4 + 4 + 2 * int(np.diff(positions).max())
        if self._shared > DEFAULT_SHARED_BYTES:
            kernel._call(
                "cuFuncSetAttribute", kernel._function, MAX_DYNAMIC_SHARED_SIZE, self._shared
            )

    def __call__(self, out: torch.Tensor) -> None:
        """Write the unit's weights to `out`, BF16 [weights], on the current stream."""
        addresses = [ctypes.c_uint64(tensor.data_ptr()) for tensor in (*self._held, out)]
        values = [*addresses, *map(ctypes.c_int32, self._sizes)]
        pointers = (ctypes.c_void_p * len(values))(
            *(ctypes.cast(ctypes.pointer(value), ctypes.c_void_p) for value in values)
        )
        stream = ctypes.c_void_p(torch.cuda.current_stream(self._device).cuda_stream)
        block = (BLOCK_WINDOWS, 1, 1)
        self._kernel._call(
            "cuLaunchKernel", self._kernel._function, self._grid, 1, 1, *block, self._shared,
            stream, pointers, None,
        )  # fmt: skip


def _ptx() -> Path:
    spec = importlib.util.find_spec("dfloat11")
    if spec is None or spec.origin is None:
        raise NotHereError("the package dfloat11 is not installed")
    path = Path(spec.origin).parent / "decode.ptx"
    if not path.exists():
        raise NotHereError(f"no {path.name} beside {spec.origin}")
    return path


def _padded(array: Any, device: torch.device) -> torch.Tensor:
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return torch.from_numpy(np.append(flat, np.zeros(16, np.uint8))).to(device)


class Nvcomp:
    """One algorithm of nvCOMP on BF16 weights, called through its Python package.

    Raises:
        NotHereError: there is no GPU, or the package is not installed.
    """

    def __init__(self, algorithm: str, device: torch.device) -> None:
        if device.type != "cuda":
            raise NotHereError("needs a GPU")
        try:
            from nvidia import nvcomp
        except ImportError as error:
            raise NotHereError("the package nvidia-nvcomp is not installed") from error
        self._nvcomp, self._stream = nvcomp, torch.cuda.current_stream(device).cuda_stream
        # The type with the width of a weight; for it, ANS knows the position of a number's exponent.
        self._codec = nvcomp.Codec(algorithm=algorithm, data_type="<f2", cuda_stream=self._stream)

    def encode(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the compressed bytes of BF16 weights, uint8 on their device."""
        source = self._array(weight.view(-1).view(torch.uint8))
        encoded = self._codec.encode(source)
        torch.cuda.synchronize()
        held = torch.from_dlpack(encoded.to_dlpack(cuda_stream=self._stream)).view(torch.uint8)
        return held[: encoded.buffer_size].clone()

    def decoder(self, encoded: torch.Tensor, out: torch.Tensor) -> Any:
        """Return a call that decodes into BF16 `out` without waiting for the device."""
        source, target = self._array(encoded), self._array(out.view(-1).view(torch.uint8))
        config = self._codec.decompression_config(source)
        return lambda: self._codec.decode(source, decompression_config=config, out=target)

    def _array(self, tensor: torch.Tensor) -> Any:
        return self._nvcomp.as_array(tensor, cuda_stream=self._stream)


def _fused_moe(device: torch.device) -> Any:
    """Return vLLM's module of Triton kernels for experts.

    Raises:
        NotHereError: there is no GPU, or vLLM is not installed.
    """
    if device.type != "cuda":
        raise NotHereError("needs a GPU")
    if importlib.util.find_spec("vllm") is None:
        raise NotHereError("vLLM is not installed")
    try:
        return importlib.import_module("vllm.model_executor.layers.fused_moe.fused_moe")
    except (ImportError, RuntimeError) as error:
        raise NotHereError(f"vLLM has no such kernel: {error}") from error


def fused_experts(device: torch.device) -> Callable[..., torch.Tensor]:
    """Return vLLM's product with BF16 experts: (x, w13, w2, weights of the experts, ids) -> the sum per token.

    Raises:
        NotHereError: there is no GPU, or vLLM is not installed.
    """
    return _fused_moe(device).fused_experts  # type: ignore[no-any-return]


class ExpertsKernel:
    """vLLM's Triton kernel for one product with BF16 experts, and how vLLM launches it.

    Raises:
        NotHereError: there is no GPU, or vLLM is not installed.
    """

    def __init__(self, device: torch.device) -> None:
        self._module = _fused_moe(device)

    def config(
        self, w13: tuple[int, int, int], w2: tuple[int, int, int], top_k: int, num_tokens: int
    ) -> dict[str, int]:
        """Return the launch that vLLM chooses for tensors of these shapes."""
        return self._module.try_get_optimal_moe_config(w13, w2, top_k, None, num_tokens)  # type: ignore[no-any-return]

    def multiply(
        self, x: torch.Tensor, weight: torch.Tensor, routed: Routed, out: torch.Tensor, config: dict[str, int]
    ) -> None:  # fmt: skip
        """Write the rows of the result to `out`, BF16 [tokens * top_k, rows]."""
        import triton.language as tl

        parts = None if routed.weights is None else routed.weights.view(-1, routed.top_k)
        self._module.invoke_fused_moe_triton_kernel(
            x, weight, out.view(len(x), routed.top_k, -1), None, None, parts, routed.ids, routed.expert_of_block,
            routed.num_padded, parts is not None, routed.top_k, config, compute_type=tl.bfloat16, use_fp8_w8a8=False,
            use_int8_w8a8=False, use_int8_w8a16=False, use_int4_w4a16=False, per_channel_quant=False,
        )  # fmt: skip
