"""The bridge for official DFloat11 units: decode a whole unit on the device where its weights are wanted.

Op (namespace `vllm_dfloat`), with a CPU implementation (numba), a CUDA one (the two-phase Triton kernel) and a fake:

    decode_dfloat11(stream, sign_mantissa, tables, positions, gaps, out, status)
"""

from typing import Any

import numpy as np
import torch

from vllm_dfloat.checkpoint.decode_blocks import decode_blocks, wide_table
from vllm_dfloat.checkpoint.unit import Unit
from vllm_dfloat.errors import FormatError
from vllm_dfloat.ops import check_device, uses_triton

SCHEMA = (
    "decode_dfloat11(Tensor stream, Tensor sign_mantissa, Tensor tables, Tensor positions, "
    "Tensor gaps, Tensor(a!) out, Tensor(b!) status) -> ()"
)


def decode_dfloat11(
    stream: torch.Tensor,
    sign_mantissa: torch.Tensor,
    tables: torch.Tensor,
    positions: torch.Tensor,
    gaps: torch.Tensor,
    out: torch.Tensor,
    status: torch.Tensor,
) -> None:
    """Write the weights of a unit to `out` and a status word per block of 4096 stream bytes to `status`.

    Args:
        stream: uint8 [n_bytes], the unit's encoded_exponent.
        sign_mantissa: uint8 [N].
        tables: int32 [R - 1, 256], from checkpoint/code_tables.py.
        positions: int64 [B + 1], first weight of each block, then N.
        gaps: uint8 [320 * B].
        out: BF16 [N], contiguous.
        status: int32 [B]; 0, or what contradicts the codes.
    """
    if uses_triton(out.device):
        from vllm_dfloat.kernels.decode_dfloat11 import decode

        decode(stream, sign_mantissa, tables, positions, gaps, out, status)
        return
    arrays = [tensor.numpy() for tensor in (stream, sign_mantissa, gaps, positions, tables)]
    details = np.zeros((status.numel(), 3), np.int64)
    table = wide_table(arrays[-1])
    bits = out.view(torch.uint16).numpy()
    decode_blocks(0, status.numel(), 0, *arrays, table, 0, bits, details)
    status.copy_(torch.from_numpy(details[:, 0]))


def _decode_dfloat11_fake(*tensors: torch.Tensor) -> None:
    return None


def decode_unit(unit: Unit, device: torch.device) -> torch.Tensor:
    """Return all weights of a unit, BF16 [N] on `device`.

    Raises:
        FormatError: the codes contradict the unit's gaps, positions or tables.
        DeviceError: the device cannot decode.
    """
    check_device(device)
    fields = (unit.stream, unit.sign_mantissa, unit.tables, unit.positions, unit.gaps)
    tensors = [torch.from_numpy(field).to(device) for field in fields]
    out = torch.empty(unit.num_weights, dtype=torch.bfloat16, device=device)
    status = torch.zeros(unit.num_blocks, dtype=torch.int32, device=device)
    torch.ops.vllm_dfloat.decode_dfloat11(*tensors, out, status)
    wrong = status.nonzero()
    if wrong.numel():
        block = int(wrong[0])
        raise FormatError(
            f"{unit.where}.encoded_exponent: block {block} ended with status {int(status[block])}; its codes "
            "contradict output_positions, gaps or luts. The file is damaged; fetch it again."
        )
    return out


class UnitDecoder:
    """Decodes units on a device and gives out views of the last one, so that a unit is decoded once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._unit: Unit | None = None
        self._weights = torch.empty(0)

    def __call__(self, unit: Unit, start: int, stop: int) -> torch.Tensor:
        """Return weights start..stop of `unit`, BF16 [stop - start]."""
        if unit is not self._unit:
            self._weights = torch.empty(0)  # the last unit goes before the next one comes
            self._weights, self._unit = decode_unit(unit, self.device), unit
        return self._weights[start:stop]


def _register() -> torch.library.Library:
    library: Any = torch.library.Library("vllm_dfloat", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(SCHEMA)
    for key in ("CPU", "CUDA"):
        library.impl("decode_dfloat11", decode_dfloat11, key)
    torch.library.register_fake("vllm_dfloat::decode_dfloat11", _decode_dfloat11_fake, lib=library)
    return library  # type: ignore[no-any-return]


_library = _register()
