"""The one bridge between the codec and the kernels: packed weights as torch tensors, and how they are read.

    decode(desc, rows, cols, out, status)       the whole matrix into the caller's buffer
    decode_rows(desc, ids, rows, cols) -> rows  chosen rows only, for embedding look-ups

Both run numba on a CPU and Triton on a GPU. They take a descriptor, int64[4] with the payload's address, and never the
payload: the payload's size depends on the weights, and a traced graph must not depend on the weights. The owner of a
`PackedWeight` keeps the payload alive. A changed descriptor is not followed (descriptor.py): on a CPU it raises
FormatError with the tensor's name; on a GPU every weight becomes NaN and `decode` sets a status, since nothing waits
for the GPU.
"""

import ctypes

import numpy as np
import torch

from vllm_dfloat.codec.decode import check_status, decode_into, decode_run_into
from vllm_dfloat.codec.decode import decode_rows as _decode_rows_numba
from vllm_dfloat.codec.encode import encode
from vllm_dfloat.codec.layout import TILE_WEIGHTS, PackedLayout, PackedTensor
from vllm_dfloat.device import packed_encode
from vllm_dfloat.device.checks import check_desc, check_ids, check_tensor
from vllm_dfloat.device.checks import check_device as check_device
from vllm_dfloat.device.checks import uses_triton as uses_triton
from vllm_dfloat.device.checksum import checksum
from vllm_dfloat.device.packed_weight import DESC_LENGTH as DESC_LENGTH
from vllm_dfloat.device.packed_weight import KIND_PACKED as KIND_PACKED
from vllm_dfloat.device.packed_weight import KIND_RAW as KIND_RAW
from vllm_dfloat.device.packed_weight import PackedWeight as PackedWeight
from vllm_dfloat.device.packed_weight import follow, make_descriptor
from vllm_dfloat.errors import UnsupportedError


def padded_numel(rows: int, cols: int) -> int:
    """Return the number of elements of a decode output: whole tiles."""
    return PackedLayout(rows, cols, 0).padded_numel


def num_tiles(rows: int, cols: int) -> int:
    """Return the number of tiles, which is the number of status words that a decode writes."""
    return PackedLayout(rows, cols, 0).num_tiles


def pack(weight: torch.Tensor, name: str = "") -> PackedWeight:
    """Encode a BF16 matrix on its device; the result holds no reference to the matrix.

    Args:
        weight: BF16 [rows, cols] on a CPU or a GPU.
        name: the tensor's name, for messages.

    Raises:
        UnsupportedError: not a BF16 matrix.
        DeviceError: the device cannot decode, or is a GPU and Triton is not installed.
    """
    if weight.dtype != torch.bfloat16 or weight.dim() != 2:
        raise UnsupportedError(
            f"{name or 'weight'}: {weight.dtype} {list(weight.shape)}; expected a BF16 matrix. "
            "Name this layer in `ignore`, or load the model with dtype bfloat16."
        )
    check_device(weight.device)
    if weight.device.type == "cuda":
        lay, payload = packed_encode.encode(weight, name)
    else:
        packed = encode(weight.detach().contiguous().view(torch.uint16).numpy(), name)
        lay, payload = packed.layout, torch.from_numpy(packed.payload)
    rows, cols = weight.shape
    fields = (KIND_RAW if lay.is_raw else KIND_PACKED, lay.num_words, lay.code_bits)
    desc = make_descriptor(payload, fields, lay.num_tiles, name)
    return PackedWeight(payload, desc, rows, cols, name, fields, checksum(payload))


def packed_at(desc: torch.Tensor, rows: int, cols: int, name: str = "") -> PackedTensor:
    """Return the packed matrix that a descriptor in CPU memory points to, without a copy."""
    address, (kind, num_words, code_bits) = follow(desc, num_tiles(rows, cols))
    lay = PackedLayout(rows, cols, 0 if kind == KIND_RAW else num_words, code_bits)
    if not lay.num_bytes:
        return PackedTensor(lay, np.empty(0, np.uint8), name)
    view = (ctypes.c_uint8 * lay.num_bytes).from_address(address)
    return PackedTensor(lay, np.ctypeslib.as_array(view), name)


def decode(
    desc: torch.Tensor, rows: int, cols: int, out: torch.Tensor, status: torch.Tensor
) -> None:
    """Decode the matrix [rows, cols] that `desc` describes; does not wait for the device, allocates nothing on a GPU.

    Args:
        desc: int64 [4], from a PackedWeight.
        rows, cols: its shape.
        out: BF16, flat, contiguous, at least `padded_numel(rows, cols)` elements, aligned to 16 bytes.
        status: int32, at least `num_tiles(rows, cols)`; 0 per tile, or a sum of STATUS_* bits.

    Raises:
        UnsupportedError: a tensor of another dtype, size, device or alignment.
        FormatError: on a CPU, the descriptor was changed.
    """
    check_desc("decode", desc)
    check_tensor("decode: out", out, torch.bfloat16, padded_numel(rows, cols), desc.device, 16)
    check_tensor("decode: status", status, torch.int32, num_tiles(rows, cols), desc.device)
    launch_decode(desc, rows, cols, out, status)


def launch_decode(
    desc: torch.Tensor, rows: int, cols: int, out: torch.Tensor, status: torch.Tensor
) -> None:
    """Do what `decode` does without its checks: for forward passes, whose buffers the scratch arena made."""
    if not rows * cols:
        return
    if uses_triton(out.device):
        from vllm_dfloat.kernels.packed_decode import decode as decode_triton

        decode_triton(desc, num_tiles(rows, cols), out, status)
    else:
        packed = packed_at(desc, rows, cols)
        decode_into(packed, out.view(torch.uint16).numpy(), status.numpy())


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
        first: begins a tile: first * cols is a multiple of 2048.
        out: BF16, flat, contiguous, at least `padded_numel(count, cols)` elements, aligned to 16 bytes.
        status: int32, at least `num_tiles(count, cols)`.
    """
    if not count * cols:
        return
    first_tile, tiles = first * cols // TILE_WEIGHTS, num_tiles(count, cols)
    if uses_triton(out.device):
        from vllm_dfloat.kernels.packed_decode import decode_run

        decode_run(desc, num_tiles(rows, cols), first_tile, tiles, out, status)
    else:
        packed = packed_at(desc, rows, cols)
        bits = out.view(torch.uint16).numpy()
        decode_run_into(packed, first_tile, tiles, bits, status.numpy())


def decode_rows(desc: torch.Tensor, ids: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """Return rows `ids` (int64 [n]) of the matrix that `desc` describes: BF16 [n, cols].

    Raises:
        UnsupportedError: ids of another dtype, shape or device.
        IndexError: on a CPU, a row outside the matrix.
        FormatError: on a CPU, the descriptor was changed, or a touched tile's codes contradict its lane lengths.
    """
    check_desc("decode_rows", desc)
    check_ids("decode_rows", ids, desc.device)
    if uses_triton(ids.device):
        from vllm_dfloat.kernels.packed_rows import decode_rows as decode_rows_triton

        out = torch.empty(ids.numel(), cols, dtype=torch.bfloat16, device=ids.device)
        decode_rows_triton(desc, ids, rows, cols, out)
        return out
    bits = _decode_rows_numba(packed_at(desc, rows, cols), ids.long().numpy())
    return torch.from_numpy(bits).view(torch.bfloat16)


def unpack(packed: PackedWeight) -> torch.Tensor:
    """Return the BF16 matrix [rows, cols] on the packed weight's device; check every tile's status and all bytes.

    Raises:
        FormatError: the payload or the descriptor changed after encoding.
    """
    packed.check_descriptor()
    device = packed.desc.device
    out = torch.empty(padded_numel(packed.rows, packed.cols), dtype=torch.bfloat16, device=device)
    status = torch.empty(num_tiles(packed.rows, packed.cols), dtype=torch.int32, device=device)
    decode(packed.desc, packed.rows, packed.cols, out, status)
    check_status(status.cpu().numpy(), packed.name)
    packed.check_payload()
    return out[: packed.rows * packed.cols].view(packed.rows, packed.cols)


def unpack_rows(packed: PackedWeight, ids: torch.Tensor) -> torch.Tensor:
    """Return rows `ids`, int64 [n], as BF16 [n, cols]; check the status of every tile they touch and all bytes.

    Raises:
        UnsupportedError: ids of another dtype, shape or device.
        IndexError: a row outside the matrix.
        FormatError: the payload or the descriptor changed after encoding.
    """
    rows, cols, name = packed.rows, packed.cols, packed.name
    check_rows(name, ids, rows, packed.desc.device)
    packed.check_descriptor()
    out = _unpack_rows(packed, ids, rows, cols, name)
    packed.check_payload()
    return out


def check_rows(name: str, ids: torch.Tensor, rows: int, device: torch.device) -> None:
    """Check that all `ids` are rows of a matrix of `rows` rows on `device`; waits for the device.

    Raises:
        UnsupportedError: ids of another dtype, shape or device.
        IndexError: one of them is outside the matrix.
    """
    check_ids(name or "weight", ids, device)
    if ids.numel() and not (ids.min() >= 0 and ids.max() < rows):
        raise IndexError(
            f"{name or 'weight'}: rows {ids.min()} to {ids.max()} asked for; the matrix has {rows}"
        )


def _unpack_rows(
    packed: PackedWeight, ids: torch.Tensor, rows: int, cols: int, name: str
) -> torch.Tensor:
    if not uses_triton(ids.device):
        bits = _decode_rows_numba(packed_at(packed.desc, rows, cols, name), ids.long().numpy())
        return torch.from_numpy(bits).view(torch.bfloat16)
    from vllm_dfloat.kernels import packed_rows as kernels

    out = torch.empty(ids.numel(), cols, dtype=torch.bfloat16, device=ids.device)
    if out.numel():
        shape = ids.numel(), kernels.statuses_per_row(cols)
        status = torch.full(shape, -1, dtype=torch.int32, device=ids.device)
        kernels.decode_rows(packed.desc, ids, rows, cols, out, status)
        first_wrong = status.gather(1, (status != 0).int().argmax(1, keepdim=True)).view(-1)
        check_status(first_wrong.cpu().numpy(), name, "row")
    return out
