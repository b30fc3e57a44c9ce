"""Matrices in the fast layout on a device: packed, read through their descriptor, and checked."""

from collections.abc import Callable

import pytest
import torch
from fast_matrices import fast_matrices
from helpers import gaussian, poisoned, same_bits, to_torch, unlike

from vllm_dfloat.device import fast_ops, ops
from vllm_dfloat.errors import FormatError, UnsupportedError

MATRICES = fast_matrices()
NAMES = [
    "37 x 333",
    "100 x 328",
    "whole tiles",
    "specials and a zero row",
    "a raw tile at the edge",
]
BACKENDS = ["numba", "triton"]


def packed(name: str = "37 x 333") -> fast_ops.FastWeight:
    fast = fast_ops.pack(to_torch(MATRICES[name]), "model.layers.0.weight")
    assert fast is not None
    return fast


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_unpacked_equals_the_original(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_DFLOAT_BACKEND", backend)
    weight = to_torch(MATRICES[name])
    fast = packed(name)
    ids = torch.tensor([0, weight.shape[0] - 1, 3])
    assert same_bits(fast_ops.unpack(fast), weight)
    assert same_bits(fast_ops.unpack_rows(fast, ids), weight[ids])
    out = poisoned((weight.numel() + 8,), unlike(MATRICES[name]), weight.device)
    before = out[-8:].clone()
    status = torch.full((fast_ops.num_tiles(*weight.shape),), -1, dtype=torch.int32)
    fast_ops.decode(fast.desc, *weight.shape, out, status)
    assert not status.any()
    assert same_bits(out[:-8].view(weight.shape), weight)
    assert same_bits(out[-8:], before), "written past the matrix"


def test_a_copy_has_its_own_descriptor() -> None:
    fast = packed()
    copy = fast.to("cpu")
    assert type(copy) is fast_ops.FastWeight
    assert same_bits(fast_ops.unpack(copy), to_torch(MATRICES["37 x 333"]))


def test_every_byte_counts() -> None:
    fast = packed()
    fast.payload[5] ^= 1
    for read in (
        lambda: fast_ops.unpack(fast),
        lambda: fast_ops.unpack_rows(fast, torch.tensor([0])),
    ):
        with pytest.raises(
            FormatError, match=r"model.layers.0.weight: the \d+ packed bytes have checksum"
        ):
            read()


@pytest.mark.parametrize(
    "read",
    [
        lambda fast: fast_ops.unpack(fast),
        lambda fast: fast_ops.unpack_rows(fast, torch.tensor([0])),
        lambda fast: fast_ops.decode_rows(fast.desc, torch.tensor([0]), 37, 333),
    ],
    ids=["unpack", "unpack_rows", "decode_rows"],
)
def test_a_changed_descriptor_is_not_followed_and_names_the_weight(
    read: Callable[[fast_ops.FastWeight], None],
) -> None:
    fast = packed()
    fast.desc[0] += 16
    with pytest.raises(FormatError, match=r"model.layers.0.weight: descriptor .*expected"):
        read(fast)


def test_a_descriptor_of_another_layout_or_shape_is_not_followed() -> None:
    weight = to_torch(gaussian(64, 128))
    other, fast = ops.pack(weight, "other"), fast_ops.pack(weight, "fast")
    assert fast is not None
    ids = torch.tensor([0])
    with pytest.raises(FormatError, match="other: descriptor"):
        fast_ops.decode_rows(other.desc, ids, 64, 128)
    with pytest.raises(FormatError, match="fast: descriptor"):
        ops.decode_rows(fast.desc, ids, 64, 128)
    with pytest.raises(FormatError, match="fast: descriptor"):
        fast_ops.decode_rows(fast.desc, ids, 128, 64)


def test_a_matrix_that_would_take_14_bits_per_weight_is_not_held() -> None:
    assert fast_ops.pack(torch.zeros(1, 1, dtype=torch.bfloat16)) is None
    assert fast_ops.pack(torch.zeros(0, 16, dtype=torch.bfloat16)) is None


@pytest.mark.parametrize(
    "weight", [torch.zeros(4, 4), torch.zeros(8, dtype=torch.bfloat16)], ids=["float32", "1-D"]
)
def test_anything_but_a_bf16_matrix_is_refused(weight: torch.Tensor) -> None:
    with pytest.raises(UnsupportedError, match=r"w: .*expected a BF16 matrix"):
        fast_ops.pack(weight, "w")


@pytest.mark.parametrize("numel", [37 * 333 - 1, 0])
def test_a_buffer_that_is_too_small_is_refused(numel: int) -> None:
    out, status = torch.empty(numel, dtype=torch.bfloat16), torch.empty(3, dtype=torch.int32)
    with pytest.raises(UnsupportedError, match="decode_fast: out"):
        fast_ops.decode(packed().desc, 37, 333, out, status)
