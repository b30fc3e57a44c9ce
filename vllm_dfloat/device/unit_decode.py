"""The bridge for official DFloat11 units: decode a unit, or a range of its weights, on a device.

It runs numba on a CPU and the two-phase Triton kernel on a GPU.
"""

import numpy as np
import torch

from vllm_dfloat.codec.decode import check_status
from vllm_dfloat.device.ops import check_device, uses_triton
from vllm_dfloat.dfloat11.decode_loops import decode_blocks, wide_table
from vllm_dfloat.dfloat11.unit import Unit


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

    If `status` has fewer words than there are blocks, only the first blocks are decoded.

    Args:
        stream: uint8 [n_bytes], the unit's encoded_exponent.
        sign_mantissa: uint8 [N].
        tables: int32 [R - 1, 256], from dfloat11/tables.py.
        positions: int64 [B + 1], first weight of each block, then N.
        gaps: uint8 [320 * B].
        out: BF16 [N], contiguous.
        status: int32 [1 to B]; 0, or a sum of STATUS_* bits, if the codes contradict the rest.
    """
    if uses_triton(out.device):
        from vllm_dfloat.kernels.dfloat11_decode import decode

        decode(stream, sign_mantissa, tables, positions, gaps, out, status)
        return
    arrays = [tensor.numpy() for tensor in (stream, sign_mantissa, gaps, positions, tables)]
    details = np.zeros((status.numel(), 3), np.int64)
    table = wide_table(arrays[-1])
    bits = out.view(torch.uint16).numpy()
    decode_blocks(0, status.numel(), 0, *arrays, table, 0, bits, details)
    status.copy_(torch.from_numpy(details[:, 0]))


def decode_unit(
    unit: Unit, device: torch.device, start: int = 0, stop: int | None = None
) -> torch.Tensor:
    """Return weights start..stop of the unit (stop excluded, default all), BF16 [stop - start] on `device`.

    Only the blocks that hold these weights are copied to the device.

    Raises:
        FormatError: the codes contradict the unit's gaps, positions or tables.
        DeviceError: the device cannot decode.
    """
    check_device(device)
    stop = unit.num_weights if stop is None else stop
    if not 0 <= start <= stop <= unit.num_weights:
        raise ValueError(f"{unit.where}: weights {start}..{stop} of {unit.num_weights}")
    if start == stop:
        return torch.empty(0, dtype=torch.bfloat16, device=device)
    first, last = unit.blocks_of(start, stop)
    piece = unit.piece(first, last)
    fields = (piece.stream, piece.sign_mantissa, piece.tables, piece.positions, piece.gaps)
    arguments = [torch.from_numpy(field).to(device) for field in fields]
    out = torch.empty(piece.num_weights, dtype=torch.bfloat16, device=device)
    status = torch.zeros(last - first, dtype=torch.int32, device=device)
    arguments += [out, status]
    decode_dfloat11(*arguments)
    advice = "Codes contradict output_positions, gaps or luts: the file is damaged; fetch it again."
    check_status(status.cpu().numpy(), f"{unit.where}.encoded_exponent", "block", first, advice)
    begin = int(unit.positions[first])
    return out[start - begin : stop - begin]
