"""Matrices in the fast layout as torch tensors, and how they are read.

The functions are those of the packed layout in ops.py. They run numba on a CPU and Triton on a GPU:

    decode(desc, rows, cols, out, status)       the whole matrix into the caller's buffer
    decode_rows(desc, ids, rows, cols) -> rows  chosen rows only, for embedding look-ups
"""

import ctypes
from functools import cached_property

import numpy as np
import torch

from vllm_dfloat.codec import fast_decode
from vllm_dfloat.codec.decode import check_status
from vllm_dfloat.codec.descriptor import KIND_FAST
from vllm_dfloat.codec.fast_encode import encode
from vllm_dfloat.codec.fast_layout import FastLayout, FastTensor, size
from vllm_dfloat.codec.layout import ALIGNMENT, TILE_WEIGHTS
from vllm_dfloat.device import fast_encode, ops
from vllm_dfloat.device.checks import check_desc, check_device, check_ids, check_tensor
from vllm_dfloat.device.checksum import checksum
from vllm_dfloat.device.packed_weight import PackedWeight, follow, make_descriptor
from vllm_dfloat.errors import UnsupportedError


class FastWeight(PackedWeight):
    """One matrix in the fast layout on its device.

    Attributes:
        payload: uint8, all bytes of the matrix (docs/fast-layout.md).
        fields: kind (2), number of entries, base.
        desc, rows, cols, name, checksum: as in PackedWeight.
    """

    @property
    def size(self) -> int:
        """The size that the seal of the descriptor covers: both sides of the matrix."""
        return size(self.rows, self.cols)

    @cached_property
    def expected_bytes(self) -> int:
        """Bytes of a payload with this shape and these fields."""
        _, num_entries, base = self.fields
        return FastLayout(self.rows, self.cols, base, num_entries).num_bytes


def num_tiles(rows: int, cols: int) -> int:
    """Return the number of tiles, which is the number of status words that a decode writes."""
    return FastLayout(rows, cols, 0, 0).num_tiles


def scratch_numel(rows: int, cols: int) -> int:
    """Return the elements of scratch (scratch.py) that decoding a matrix or multiplying by it needs.

    They are whole tiles of the packed layout, each of which brings a status word. The sums of a product fit in too
    (kernels/fast_matmul.py).
    """
    return max(ops.padded_numel(rows, cols), num_tiles(rows, cols) * TILE_WEIGHTS)


def pack(weight: torch.Tensor, name: str = "", *, must_be_small: bool = True) -> FastWeight | None:
    """Encode a BF16 matrix on its device; the result holds no reference to the matrix.

    Args:
        weight: BF16 [rows, cols] on a CPU or a GPU.
        name: the tensor's name, for messages.
        must_be_small: if not, only a matrix without elements, or with too many entries for 32 bits, gives None.

    Returns:
        None where the matrix would take 14 bits per weight or more.

    Raises:
        UnsupportedError: not a BF16 matrix.
        DeviceError: the device cannot decode, or encodes wrongly.
    """
    if weight.dtype != torch.bfloat16 or weight.dim() != 2:
        raise UnsupportedError(
            f"{name or 'weight'}: {weight.dtype} {list(weight.shape)}; expected a BF16 matrix. "
            "Name this layer in `ignore`, or load the model with dtype bfloat16."
        )
    check_device(weight.device)
    if weight.is_cuda:
        fast_encode.check_encoder(weight.device)
        coded = fast_encode.encode(weight, name, must_be_small=must_be_small)
    else:
        coded = _encode_on_cpu(weight, name, must_be_small)
    if coded is None:
        return None
    layout, payload = coded
    fields = KIND_FAST, layout.num_entries, layout.base
    desc = make_descriptor(payload, fields, size(layout.rows, layout.cols), name)
    return FastWeight(payload, desc, layout.rows, layout.cols, name, fields, checksum(payload))


def pack_again(weight: torch.Tensor, name: str = "") -> FastWeight:
    """Encode a BF16 matrix whatever bits it then takes: new values of one that is held in this layout.

    Raises:
        UnsupportedError: not a BF16 matrix; or one without elements, or with too many entries for 32 bits.
        DeviceError: the device cannot decode.
    """
    fast = pack(weight, name, must_be_small=False)
    if fast is None:
        raise UnsupportedError(
            f"{name or 'weight'}: these values of a matrix {list(weight.shape)} cannot be held in the fast layout. "
            "Load the model with layout packed."
        )
    return fast


def _encode_on_cpu(
    weight: torch.Tensor, name: str, must_be_small: bool
) -> tuple[FastLayout, torch.Tensor] | None:
    bits = weight.detach().contiguous().view(torch.uint16).numpy()
    fast = encode(bits, name, must_be_small=must_be_small)
    return None if fast is None else (fast.layout, torch.from_numpy(fast.payload))


def fast_at(desc: torch.Tensor, rows: int, cols: int, name: str = "") -> FastTensor:
    """Return the matrix that a descriptor in CPU memory points to, without a copy."""
    address, (_, num_entries, base) = follow(desc, size(rows, cols))
    layout = FastLayout(rows, cols, base, num_entries)
    view = (ctypes.c_uint8 * layout.num_bytes).from_address(address)
    return FastTensor(layout, np.ctypeslib.as_array(view), name)


def decode(
    desc: torch.Tensor, rows: int, cols: int, out: torch.Tensor, status: torch.Tensor
) -> None:
    """Decode the matrix [rows, cols] that `desc` describes; does not wait for the device, allocates nothing on a GPU.

    Args:
        desc: int64 [4], from a FastWeight.
        rows, cols: its shape.
        out: BF16, flat, contiguous, at least rows * cols elements, aligned to 16 bytes.
        status: int32, at least `num_tiles(rows, cols)`; 0 per tile, or a STATUS_* bit.

    Raises:
        UnsupportedError: a tensor of another dtype, size, device or alignment.
        FormatError: on a CPU, the descriptor was changed.
    """
    check_desc("decode_fast", desc)
    check_tensor("decode_fast: out", out, torch.bfloat16, rows * cols, desc.device, ALIGNMENT)
    tiles = num_tiles(rows, cols)
    check_tensor("decode_fast: status", status, torch.int32, tiles, desc.device)
    launch_decode(desc, rows, cols, out, status)


def launch_decode(
    desc: torch.Tensor, rows: int, cols: int, out: torch.Tensor, status: torch.Tensor
) -> None:
    """Do what `decode` does without its checks: for forward passes, whose buffers the scratch arena made."""
    if ops.uses_triton(out.device):
        from vllm_dfloat.kernels.fast_decode import decode as decode_triton

        decode_triton(desc, rows, cols, out, status)
        return
    bits = out.view(torch.uint16).numpy()[: rows * cols].reshape(rows, cols)
    fast_decode.decode_into(fast_at(desc, rows, cols), bits, status.numpy())


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
        first: begins a tile, a multiple of 64.
        out: BF16, flat, contiguous, at least count * cols elements, aligned to 16 bytes.
        status: int32, at least `num_tiles(count, cols)`.
    """
    if not count * cols:
        return
    if ops.uses_triton(out.device):
        from vllm_dfloat.kernels.fast_decode import decode_run

        decode_run(desc, rows, cols, first, count, out, status)
        return
    bits = out.view(torch.uint16).numpy()[: count * cols].reshape(count, cols)
    fast_decode.decode_into(fast_at(desc, rows, cols), bits, status.numpy(), first)


def decode_rows(desc: torch.Tensor, ids: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """Return rows `ids` (int32 or int64 [n]) of the matrix that `desc` describes: BF16 [n, cols].

    Raises:
        UnsupportedError: ids of another dtype, shape or device.
        IndexError: on a CPU, a row outside the matrix.
        FormatError: on a CPU, the descriptor was changed, or the starts of the entries contradict each other.
    """
    check_desc("decode_fast_rows", desc)
    check_ids("decode_fast_rows", ids, desc.device)
    if ops.uses_triton(ids.device):
        from vllm_dfloat.kernels.fast_rows import decode_rows as decode_rows_triton

        out = torch.empty(ids.numel(), cols, dtype=torch.bfloat16, device=ids.device)
        decode_rows_triton(desc, ids, rows, cols, out)
        return out
    bits = fast_decode.decode_rows(fast_at(desc, rows, cols), ids.long().numpy())
    return torch.from_numpy(bits).view(torch.bfloat16)


def unpack(fast: PackedWeight) -> torch.Tensor:
    """Return the BF16 matrix [rows, cols] on the weight's device; check every tile's status and all bytes.

    Raises:
        FormatError: the payload or the descriptor changed after encoding.
    """
    fast.check_descriptor()
    rows, cols, device = fast.rows, fast.cols, fast.desc.device
    out = torch.empty(rows * cols, dtype=torch.bfloat16, device=device)
    status = torch.empty(num_tiles(rows, cols), dtype=torch.int32, device=device)
    decode(fast.desc, rows, cols, out, status)
    check_status(status.cpu().numpy(), fast.name)
    fast.check_payload()
    return out.view(rows, cols)


def unpack_rows(fast: PackedWeight, ids: torch.Tensor) -> torch.Tensor:
    """Return rows `ids`, int64 [n], as BF16 [n, cols]; check all bytes.

    Raises:
        UnsupportedError: ids of another dtype, shape or device.
        IndexError: a row outside the matrix.
        FormatError: the payload or the descriptor changed after encoding.
    """
    ops.check_rows(fast.name, ids, fast.rows, fast.desc.device)
    fast.check_descriptor()
    fast.check_payload()  # before decoding: rows have no status
    return decode_rows(fast.desc, ids, fast.rows, fast.cols)
