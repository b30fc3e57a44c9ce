"""Weights held in the official DFloat11 layout while a model is served; each matrix is its own unit.

The functions are those of the packed layout in ops.py, so that one harness can measure both. They run numba on a CPU
and the two-phase Triton kernel on a GPU:

    decode(desc, rows, cols, out, status)       the whole matrix into the caller's buffer
    decode_rows(desc, ids, rows, cols) -> rows  chosen rows only, by decoding the blocks they touch
"""

import ctypes

import numpy as np
import torch

from vllm_dfloat.codec.arrays import I64Array, U8Array, U16Array, U64Array
from vllm_dfloat.codec.decode import check_status
from vllm_dfloat.codec.layout import ALIGNMENT
from vllm_dfloat.codec.threads import over_tiles
from vllm_dfloat.device import ops
from vllm_dfloat.device.checks import check_desc, check_ids, check_tensor
from vllm_dfloat.device.checksum import checksum
from vllm_dfloat.device.packed_weight import follow, make_descriptor
from vllm_dfloat.device.unit_layout import (
    Sections,
    UnitLayout,
    UnitWeight,
    encoded,
    sections_of,
    sound,
)
from vllm_dfloat.dfloat11.decode_loops import decode_blocks, wide_table
from vllm_dfloat.errors import UnsupportedError


def pack(weight: torch.Tensor, name: str = "") -> UnitWeight:
    """Encode a BF16 matrix on the host and put the result on its device; it holds no reference to the matrix.

    A matrix that the format cannot hold, or would not make smaller, is held as BF16. So a coded matrix has at most one
    stream byte per weight; the kernel's launch relies on this.

    Args:
        weight: BF16 [rows, cols] on a CPU or a GPU.
        name: the tensor's name, for messages.

    Raises:
        UnsupportedError: not a BF16 matrix.
        DeviceError: the device cannot decode.
    """
    if weight.dtype != torch.bfloat16 or weight.dim() != 2:
        raise UnsupportedError(
            f"{name or 'weight'}: {weight.dtype} {list(weight.shape)}; expected a BF16 matrix. "
            "Name this layer in `ignore`, or load the model with dtype bfloat16."
        )
    ops.check_device(weight.device)
    bits = weight.detach().contiguous().view(torch.uint16).cpu().numpy().reshape(-1)
    rows, cols = weight.shape
    payload, fields = encoded(bits, ops.padded_numel(rows, cols), name)
    held = torch.from_numpy(payload).to(weight.device)
    desc = make_descriptor(held, fields, -rows * cols, name)
    return UnitWeight(held, desc, rows, cols, name, fields, checksum(held))


def _payload_at(address: int, num_bytes: int) -> U8Array:
    """Return a view of CPU memory."""
    if not num_bytes:
        return np.empty(0, np.uint8)
    return np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))


def _decode_range(held: Sections, wide: U64Array, start: int, out: U16Array) -> I64Array:
    """Write the `out.size` weights from `start` on to `out`; return one status per block, 0 for a block not decoded."""
    status = np.zeros((len(held.positions) - 1, 3), np.int64)
    first = int(np.searchsorted(held.positions[1:-1], start, "right"))
    last = int(np.searchsorted(held.positions[:-1], start + out.size, "left"))
    over_tiles(
        decode_blocks, last - first, first, held.stream, held.sign_mantissa, held.gaps,
        held.positions, held.tables, wide, start, out, status[first:],
    )  # fmt: skip
    return status[:, 0]


def _open(desc: torch.Tensor, rows: int, cols: int) -> Sections | U8Array:
    """Return the sections that a descriptor in CPU memory points to, or the bytes of a raw payload."""
    address, (kind, stream_bytes, num_tables) = follow(desc, -rows * cols)
    if kind == ops.KIND_RAW:
        return _payload_at(address, 2 * ops.padded_numel(rows, cols))
    lay = UnitLayout(rows * cols, stream_bytes, num_tables)
    return sound(sections_of(_payload_at(address, lay.num_bytes), lay), lay.num_weights)


def decode(
    desc: torch.Tensor, rows: int, cols: int, out: torch.Tensor, status: torch.Tensor
) -> None:
    """Decode the matrix [rows, cols] that `desc` describes; does not wait for the device, allocates nothing on a GPU.

    Args:
        desc: int64 [4], from a UnitWeight.
        rows, cols: its shape.
        out: BF16, flat, contiguous, at least rows * cols elements, aligned to 16 bytes.
        status: int32, at least `ops.num_tiles(rows, cols)` words: word b for block b of the stream, 0 or a sum of
            STATUS_* bits; the other words become 0, or on a GPU the status of a changed descriptor.

    Raises:
        UnsupportedError: a tensor of another dtype, size, device or alignment.
        FormatError: on a CPU, the descriptor was changed.
    """
    check_desc("decode_unit", desc)
    check_tensor("decode_unit: out", out, torch.bfloat16, rows * cols, desc.device, ALIGNMENT)
    tiles = ops.num_tiles(rows, cols)
    check_tensor("decode_unit: status", status, torch.int32, tiles, desc.device)
    launch_decode(desc, rows, cols, out, status)


def launch_decode(
    desc: torch.Tensor, rows: int, cols: int, out: torch.Tensor, status: torch.Tensor
) -> None:
    """Do what `decode` does without its checks: for forward passes, whose buffers the scratch arena made."""
    numel = rows * cols
    if not numel:
        return
    if ops.uses_triton(out.device):
        from vllm_dfloat.kernels.dfloat11_resident import decode_resident

        decode_resident(desc, numel, out, status)
        return
    held, bits = _open(desc, rows, cols), out.view(torch.uint16).numpy()[:numel]
    status[: ops.num_tiles(rows, cols)] = 0
    if isinstance(held, Sections):
        found = _decode_range(held, wide_table(held.tables), 0, bits)
        status[: found.size] = torch.from_numpy(found)
    else:
        bits[:] = held.view(np.uint16)[:numel]


def launch_decode_run(
    desc: torch.Tensor,
    rows: int,
    cols: int,
    first: int,
    count: int,
    out: torch.Tensor,
    status: torch.Tensor,
) -> None:
    """Decode `count` rows of the matrix [rows, cols] from row `first` on into the beginning of `out`, without checks.

    Does not wait for the device, allocates nothing on a GPU.

    Args:
        out: BF16, flat, contiguous, at least count * cols elements, aligned to 16 bytes.
        status: not written to: blocks that two runs share would have one in each.
    """
    start, numel = first * cols, count * cols
    if not numel:
        return
    if ops.uses_triton(out.device):
        from vllm_dfloat.kernels.dfloat11_resident import decode_resident_run

        decode_resident_run(desc, rows * cols, start, numel, out)
        return
    held, bits = _open(desc, rows, cols), out.view(torch.uint16).numpy()[:numel]
    if isinstance(held, Sections):
        _decode_range(held, wide_table(held.tables), start, bits)
    else:
        bits[:] = held.view(np.uint16)[start : start + numel]


def decode_rows(desc: torch.Tensor, ids: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """Return rows `ids` (int32 or int64 [n]) of the matrix that `desc` describes: BF16 [n, cols].

    Raises:
        UnsupportedError: ids of another dtype, shape or device.
        IndexError: on a CPU, a row outside the matrix.
        FormatError: on a CPU, the descriptor was changed, or the codes contradict the gaps, positions or tables.
    """
    check_desc("decode_unit_rows", desc)
    check_ids("decode_unit_rows", ids, desc.device)
    if ops.uses_triton(ids.device):
        from vllm_dfloat.kernels.dfloat11_resident import decode_resident_rows

        out = torch.empty(ids.numel(), cols, dtype=torch.bfloat16, device=ids.device)
        decode_resident_rows(desc, ids, rows, cols, out)
        return out
    if ids.numel() and not (ids.min() >= 0 and ids.max() < rows):
        raise IndexError(f"rows {ids.min()} to {ids.max()} asked for; the matrix has {rows}")
    held, bits = _open(desc, rows, cols), np.empty((ids.numel(), cols), np.uint16)
    if isinstance(held, Sections):
        wide = wide_table(held.tables)
        for target, row in zip(bits, ids.tolist(), strict=True):
            check_status(_decode_range(held, wide, row * cols, target), "", "block")
    else:
        bits[:] = held.view(np.uint16)[: rows * cols].reshape(rows, cols)[ids.numpy()]
    return torch.from_numpy(bits).view(torch.bfloat16)


def unpack(packed: ops.PackedWeight) -> torch.Tensor:
    """Return the BF16 matrix [rows, cols] on the weight's device; check every block's status and all bytes.

    Raises:
        FormatError: the payload or the descriptor changed after encoding.
    """
    packed.check_descriptor()
    rows, cols, device = packed.rows, packed.cols, packed.desc.device
    out = torch.empty(ops.padded_numel(rows, cols), dtype=torch.bfloat16, device=device)
    status = torch.empty(ops.num_tiles(rows, cols), dtype=torch.int32, device=device)
    decode(packed.desc, rows, cols, out, status)
    check_status(status.cpu().numpy(), packed.name, "block")
    packed.check_payload()
    return out[: rows * cols].view(rows, cols)


def unpack_rows(packed: ops.PackedWeight, ids: torch.Tensor) -> torch.Tensor:
    """Return rows `ids`, int64 [n], as BF16 [n, cols]; check all bytes.

    Raises:
        UnsupportedError: ids of another dtype, shape or device.
        IndexError: a row outside the matrix.
        FormatError: the payload or the descriptor changed after encoding.
    """
    ops.check_rows(packed.name, ids, packed.rows, packed.desc.device)
    packed.check_descriptor()
    packed.check_payload()  # before decoding: rows have no status
    return decode_rows(packed.desc, ids, packed.rows, packed.cols)
