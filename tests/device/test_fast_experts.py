"""Chosen experts of a tensor in the fast layout: their bits, and no block of rows written in which none is chosen."""

import numpy as np
import pytest
import torch
from fast_matrices import heavy_tailed
from helpers import Bits, gaussian, poisoned, same_bits, to_torch, unlike

from vllm_dfloat.codec.fast_layout import TILE_ROWS
from vllm_dfloat.device import fast_experts, fast_ops
from vllm_dfloat.errors import FormatError
from vllm_dfloat.kernels import configs
from vllm_dfloat.kernels import fast_experts as kernels

CPU = torch.device("cpu")
ROWS_OF_BLOCK = {"numba": TILE_ROWS, "triton": configs.config_of(CPU).fast_rows_per_program}
Shape = tuple[int, int, int]


def with_raw_tiles() -> Bits:
    weight = gaussian(256, 300)
    weight[64:128, :128] = 0x8000  # a raw tile of expert 1
    weight[200, ::40] = 0x0001
    return weight


# Experts of whole tiles, of parts of tiles, that straddle tiles, many to a tile, raw and escaped, and one that is all.
TENSORS: dict[str, tuple[Shape, Bits]] = {
    "whole tiles": ((5, 128, 512), gaussian(640, 512)),
    "two to a tile": ((6, 32, 128), gaussian(192, 128)),
    "across tiles": ((4, 90, 330), heavy_tailed(360, 330)),
    "raw tiles": ((4, 64, 300), with_raw_tiles()),
    "many to a tile": ((40, 3, 24), gaussian(120, 24)),
    "one": ((1, 30, 100), gaussian(30, 100)),
}
CHOICES = ([0], [-1], [0, 2], [1], [], list(range(64)))


def flags(num_experts: int, which: list[int]) -> torch.Tensor:
    chosen = torch.zeros(num_experts, dtype=torch.int32)
    chosen[[i for i in which if i < num_experts]] = 1
    return chosen


@pytest.fixture(autouse=True, params=["numba", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("VLLM_DFLOAT_BACKEND", request.param)
    return str(request.param)


def decode(
    held: fast_ops.PackedWeight, shape: Shape, chosen: torch.Tensor, poison: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return BF16 [experts * rows, cols] of a decode into poisoned memory, and status words."""
    num_experts, rows, cols = shape
    out = poisoned((num_experts * rows * cols + 8,), poison, CPU)
    status = torch.full((fast_ops.num_tiles(num_experts * rows, cols),), 77, dtype=torch.int32)
    fast_experts.launch_decode_chosen(held.desc, *shape, chosen, out[:-8], status)
    assert same_bits(out[-8:], poisoned((8,), poison, CPU)), "written past the tensor"
    return out[:-8].view(-1, cols), status


def touched_rows(shape: Shape, chosen: torch.Tensor, backend: str) -> torch.Tensor:
    """Return which rows lie in a block with a row of a chosen expert."""
    num_experts, rows, _ = shape
    is_chosen = chosen.bool().repeat_interleave(rows)
    blocks = torch.arange(num_experts * rows) // ROWS_OF_BLOCK[backend]
    return torch.isin(blocks, blocks[is_chosen].unique())


def touched_tiles(touched: torch.Tensor) -> torch.Tensor:
    """Return which rows of tiles have a row that `touched_rows` gives."""
    return torch.stack([rows.any() for rows in touched.split(TILE_ROWS)])


@pytest.mark.parametrize("name", TENSORS)
def test_chosen_experts_have_their_bits_and_all_other_blocks_stay_poison(
    name: str, backend: str
) -> None:
    shape, bits = TENSORS[name]
    held, poison = fast_ops.pack_again(to_torch(bits), "w13"), unlike(bits)
    across = -(-shape[2] // 128)
    for which in CHOICES:
        chosen = flags(shape[0], which)
        out, status = decode(held, shape, chosen, poison)
        touched = touched_rows(shape, chosen, backend)
        assert same_bits(out[touched], to_torch(bits)[touched])
        rest = out[~touched]
        assert same_bits(rest, poisoned(tuple(rest.shape), poison, CPU))
        by_tile = touched_tiles(touched).repeat_interleave(across)
        assert torch.equal(status, torch.where(by_tile, 0, 77).int())


@pytest.mark.parametrize("programs", [1, 3, 100])
def test_programs_share_the_blocks_of_chosen_experts(programs: int) -> None:
    shape, bits = TENSORS["across tiles"]
    held, chosen = fast_ops.pack_again(to_torch(bits)), torch.tensor([0, -1, 0, 2**31 - 1]).int()
    out = poisoned(bits.shape, unlike(bits), CPU)
    status = torch.full((fast_ops.num_tiles(*bits.shape),), 77, dtype=torch.int32)
    kernels.decode_chosen(held.desc, *shape, chosen, out.view(-1), status, programs)
    touched = touched_rows(shape, chosen, "triton")
    assert same_bits(out[touched], to_torch(bits)[touched])
    rest = out[~touched]
    assert same_bits(rest, poisoned(tuple(rest.shape), unlike(bits), CPU))


def test_a_changed_descriptor_is_never_followed(backend: str) -> None:
    shape, bits = TENSORS["two to a tile"]
    for word in range(4):
        held = fast_ops.pack_again(to_torch(bits), "layers.3.mlp.experts.w13")
        held.desc[word] ^= 1 << 20
        if backend == "numba":
            with pytest.raises(FormatError, match=r"layers\.3\.mlp\.experts\.w13: descriptor"):
                decode(held, shape, flags(6, [2]), 0x1234)
            continue
        chosen = flags(6, [2])
        out, status = decode(held, shape, chosen, 0x1234)
        touched = touched_rows(shape, chosen, backend)
        assert status.tolist() == [77, 4, 77]
        assert out[touched].isnan().all()
        rest = out[~touched]
        assert same_bits(rest, poisoned(tuple(rest.shape), 0x1234, CPU))


def test_starts_that_contradict_each_other_are_reported_by_the_tiles_of_chosen_experts_only() -> (
    None
):
    shape, bits = TENSORS["whole tiles"]
    held = fast_ops.pack_again(to_torch(bits), "w2")
    lay = fast_ops.fast_at(held.desc, *bits.shape).layout
    starts = held.payload[lay.starts_offset : lay.entries_offset].view(torch.int32)
    starts[8 * 2 + 1] = np.iinfo(np.int32).max  # the first tile of expert 2
    _, status = decode(held, shape, flags(5, [2, 3]), 0x1234)
    assert status[16:18].tolist() == [2, 2]
    assert not status[18:32].any()
    _, status = decode(held, shape, flags(5, [1]), 0x1234)
    assert status.unique().tolist() == [0, 77]
