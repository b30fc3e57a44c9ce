"""Groups of matrices in one launch have the bits of matrices decoded one by one, in the interpreter and on the CPU."""

import pytest
import torch
from helpers import gaussian, hard_matrices, same_bits, to_torch

from vllm_dfloat.codec import layout
from vllm_dfloat.codec.descriptor import MAX_MEMBERS, ROW_WORDS
from vllm_dfloat.device import groups, ops
from vllm_dfloat.errors import FormatError, UnsupportedError
from vllm_dfloat.kernels import group_decode as kernels

POISON = 0x7FC1  # no weight of these tests


def members() -> dict[str, torch.Tensor]:
    """Return matrices that end within a program, within a tile or with a tile, one held as BF16, and others."""
    hard = hard_matrices()
    return {
        "seven tiles": to_torch(gaussian(25, 500, seed=1)),
        "held as bf16": to_torch(hard["uniform bits"] & 0xBFFF),
        "one tile, held as bf16": to_torch(hard["one tile"]),
        "four tiles": to_torch(gaussian(4, 2048, seed=2)),
        "one symbol": to_torch(hard["one symbol"]),
    }


def decode(
    packed: list[ops.PackedWeight],
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
    tiles: int = 4,
    table: torch.Tensor | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return the matrices of a group, decoded into poisoned memory, and the status words."""
    monkeypatch.setenv("VLLM_DFLOAT_BACKEND", backend)
    shapes = [(p.rows, p.cols) for p in packed]
    starts = groups.first_tiles(shapes)
    out = torch.full((starts[-1] * layout.TILE_WEIGHTS,), POISON, dtype=torch.uint16)
    status = torch.full((starts[-1],), -1, dtype=torch.int32)
    if table is None:
        table = groups.group_table([p.desc for p in packed], shapes)
    assert table.shape == (len(packed) + 1, ROW_WORDS)
    if backend == "triton":
        kernels.decode_group(table, starts[-1], out.view(torch.bfloat16), status, tiles)
    else:
        groups.decode_group(table, starts[-1], out.view(torch.bfloat16), status)
    matrices = []
    for start, (rows, cols) in zip(starts, shapes, strict=False):
        first = start * layout.TILE_WEIGHTS
        matrices.append(out[first : first + rows * cols].view(torch.bfloat16).view(rows, cols))
    return matrices, status


@pytest.mark.parametrize(
    ("backend", "tiles"), [("numba", 4), ("triton", 4), ("triton", 1), ("triton", 8)]
)
def test_group_decodes_to_the_bits_of_its_members(
    backend: str, tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = members()
    packed = [ops.pack(weight, name) for name, weight in weights.items()]
    assert {p.is_raw for p in packed} == {False, True}
    matrices, status = decode(packed, backend, monkeypatch, tiles)
    assert not status.any()
    for matrix, (name, weight) in zip(matrices, weights.items(), strict=True):
        assert same_bits(matrix, weight), name


@pytest.mark.parametrize("backend", ["numba", "triton"])
def test_descriptors_may_change_after_the_table_is_made(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Bug caught: a table with copies of the descriptors' contents, so that a reload has no effect.
    first, second = (ops.pack(to_torch(gaussian(9, 700, seed=s)), "w") for s in (1, 2))
    expected = ops.unpack(first), ops.unpack(second)
    table = groups.group_table([first.desc], [(9, 700)])
    (before,), _ = decode([first], backend, monkeypatch, table=table)
    second.described_in(first.desc)
    (after,), _ = decode([first], backend, monkeypatch, table=table)
    assert same_bits(before, expected[0])
    assert same_bits(after, expected[1])


def test_largest_group_and_no_larger_one() -> None:
    one = ops.pack(to_torch(gaussian(1, 4096)), "w")
    table = groups.group_table([one.desc] * MAX_MEMBERS, [(1, 4096)] * MAX_MEMBERS)
    assert table[-1, :2].tolist() == [0, 2 * MAX_MEMBERS]
    for number, shape in ((MAX_MEMBERS + 1, (1, 4096)), (0, (1, 4096)), (2, (0, 4096))):
        with pytest.raises(UnsupportedError, match=f"group of {number} matrices .* 1 to 16"):
            groups.group_table([one.desc] * number, [shape] * number)


@pytest.mark.parametrize("backend", ["numba", "triton"])
def test_damage_is_reported_for_the_tiles_of_its_member_only(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = [ops.pack(to_torch(gaussian(4, 2048, seed=s)), f"layers.0.{s}") for s in range(3)]
    packed[1].payload[-2000:-1900] ^= 0x5A
    _, status = decode(packed, backend, monkeypatch)
    assert not status[:4].any()
    assert status[4:8].any()
    assert not status[8:].any()
    with pytest.raises(FormatError, match=r"layers\.0\.1: tile"):
        ops.unpack(packed[1])
