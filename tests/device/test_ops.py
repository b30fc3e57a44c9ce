"""The torch side: packed weights, their readers, the scratch arena."""

import os
from unittest import mock

import pytest
import torch
from helpers import gaussian, hard_matrices, same_bits, to_torch, unlike

from vllm_dfloat.codec import layout
from vllm_dfloat.device import ops
from vllm_dfloat.device.scratch import ScratchArena
from vllm_dfloat.errors import DeviceError, FormatError, UnsupportedError

CPU = torch.device("cpu")


def decode_poisoned(packed: ops.PackedWeight, poison: int) -> torch.Tensor:
    out = torch.full((ops.padded_numel(packed.rows, packed.cols),), poison, dtype=torch.uint16)
    out = out.view(torch.bfloat16)
    status = torch.full((ops.num_tiles(packed.rows, packed.cols),), -1, dtype=torch.int32)
    ops.decode(packed.desc, packed.rows, packed.cols, out, status)
    assert not status.any()
    return out[: packed.rows * packed.cols].view(packed.rows, packed.cols)


@pytest.mark.parametrize("name", hard_matrices())
def test_decode_gives_every_hard_matrix(name: str) -> None:
    bits = hard_matrices()[name]
    packed = ops.pack(to_torch(bits), name)
    assert same_bits(decode_poisoned(packed, unlike(bits)), to_torch(bits))


def test_both_backends_give_the_same_bits() -> None:
    bits = gaussian(20, 500)
    packed = ops.pack(to_torch(bits), "w")
    for backend in ("numba", "triton"):
        with mock.patch.dict(os.environ, VLLM_DFLOAT_BACKEND=backend):
            assert same_bits(decode_poisoned(packed, unlike(bits)), to_torch(bits))
            rows = ops.decode_rows(packed.desc, torch.tensor([3, 19]), 20, 500)
            assert same_bits(rows, to_torch(bits[[3, 19]]))


def test_an_unknown_backend_is_refused() -> None:
    packed = ops.pack(to_torch(gaussian(20, 500)), "w")
    with (
        mock.patch.dict(os.environ, VLLM_DFLOAT_BACKEND="magic"),
        pytest.raises(
            DeviceError,
            match=r"VLLM_DFLOAT_BACKEND=magic: expected triton or numba\. Correct or unset it",
        ),
    ):
        ops.unpack(packed)


def test_packing_keeps_no_reference_to_the_matrix_and_counts_its_bytes() -> None:
    weight = to_torch(gaussian(256, 256))
    packed = ops.pack(weight, "w")
    kept = weight.clone()
    weight.zero_()
    assert same_bits(ops.unpack(packed), kept)
    assert packed.num_bytes == packed.payload.numel() + 32
    assert packed.num_bytes < 0.7 * kept.nbytes


@pytest.mark.parametrize(
    "weight", [torch.zeros(4, 4), torch.zeros(4, 4, dtype=torch.float16), torch.zeros(4).bfloat16()]
)
def test_what_is_not_a_bf16_matrix_is_refused_by_name(weight: torch.Tensor) -> None:
    with pytest.raises(UnsupportedError, match=r"layers.0.w: torch\..* expected a BF16 matrix"):
        ops.pack(weight, "layers.0.w")


def test_unpack_reports_a_corrupt_payload_by_name() -> None:
    packed = ops.pack(to_torch(gaussian(64, 96)), "layers.0.w")
    packed.payload[-2000:-1900] ^= 0xFF
    with pytest.raises(FormatError, match=r"layers\.0\.w: tile .* ended with status"):
        ops.unpack(packed)


@pytest.mark.parametrize("backend", ["numba", "triton"])
def test_unpacked_rows_are_the_rows_or_an_error_with_the_name(backend: str) -> None:
    bits = gaussian(6, 3000)
    packed = ops.pack(to_torch(bits), "model.embed")
    with mock.patch.dict(os.environ, VLLM_DFLOAT_BACKEND=backend):
        ids = torch.tensor([5, 0, 5])
        assert same_bits(ops.unpack_rows(packed, ids), to_torch(bits[[5, 0, 5]]))
        assert ops.unpack_rows(packed, ids[:0]).shape == (0, 3000)
        with pytest.raises(
            IndexError, match=r"model\.embed: rows -1 to 5 asked for; the matrix has 6"
        ):
            ops.unpack_rows(packed, torch.tensor([5, -1]))
        # The last words with codes belong to the last tile, which only the last row touches.
        packed.payload[-4 * layout.PAD_WORDS - 1] ^= 0xFF
        packed.payload[-4 * layout.PAD_WORDS - 8] ^= 0xFF
        with pytest.raises(FormatError, match=r"model\.embed: the \d+ packed bytes have checksum"):
            ops.unpack_rows(packed, torch.tensor([0]))
        with pytest.raises(FormatError, match=r"model\.embed: row 1 ended with status 1 \(2 of 3"):
            ops.unpack_rows(packed, torch.tensor([0, 5, 5]))


def test_scratch_is_one_buffer_for_all_layers_and_one_more_per_slot() -> None:
    arena = ScratchArena()
    arena.require(CPU, 4096)
    arena.require(CPU, 8192)
    arena.require(CPU, 2048)
    arena.reserve(CPU)
    assert arena.num_bytes(CPU) == 2 * 8192 + 4 * 4
    out, status = arena.take(CPU, 2048)
    assert (out.numel(), status.numel()) == (8192, 4)
    assert arena.take(CPU, 8192)[0].data_ptr() == out.data_ptr()
    assert arena.take(CPU, 2048, slot="beside")[0].data_ptr() != out.data_ptr()
    assert arena.num_bytes(CPU) == 2 * (2 * 8192 + 4 * 4)


def test_scratch_grows_for_a_layer_nobody_announced() -> None:
    arena = ScratchArena()
    assert arena.take(CPU, 2048)[0].numel() == 2048
    assert arena.take(CPU, 6144)[0].numel() == 6144
    arena.release()
    assert arena.take(CPU, 2048)[0].numel() == 2048
