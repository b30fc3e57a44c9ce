"""Groups of the fast layout in one launch have the bits of their members, in the interpreter and on the CPU."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from fast_matrices import fast_matrices, heavy_tailed
from helpers import gaussian, poisoned, same_bits, to_torch

from vllm_dfloat.codec.descriptor import MAX_MEMBERS
from vllm_dfloat.codec.layout import TILE_WEIGHTS
from vllm_dfloat.device import fast_groups, fast_ops
from vllm_dfloat.device.packed_weight import PackedWeight
from vllm_dfloat.errors import FormatError, UnsupportedError
from vllm_dfloat.kernels.configs import INTERPRETED, override

POISON = 0x7FC3
WHOLE = {"128 x 1024": gaussian(128, 1024), "64 x 2048": gaussian(64, 2048, seed=1)}
EIGHTS = {"100 x 328": gaussian(100, 328), "64 x 1024": gaussian(64, 1024)}
# More tiles of this layout than of the output, were these not made for them: one column, and rows of one tile each.
THIN = {"one column": gaussian(200, 1), "whole": gaussian(64, 128), "a weight": gaussian(1, 1)}
GROUPS = {
    "hard": fast_matrices(),
    "whole blocks": WHOLE,
    "eights": EIGHTS,
    "thin": THIN,
    "one": {"alone": heavy_tailed(70, 336)},
}


def held(weights: Mapping[str, torch.Tensor]) -> list[PackedWeight]:
    return [fast_ops.pack_again(weight, name) for name, weight in weights.items()]


def decode(
    packed: list[PackedWeight], table: torch.Tensor | None = None
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Return the matrices of a group, decoded into poisoned memory, their status words, and the memory."""
    shapes = [(one.rows, one.cols) for one in packed]
    starts = fast_groups.first_tiles(shapes)
    out = poisoned((starts[-1] * TILE_WEIGHTS,), POISON, torch.device("cpu"))
    status = torch.full((starts[-1],), -1, dtype=torch.int32)
    if table is None:
        table = fast_groups.group_table([one.desc for one in packed], shapes)
    fast_groups.decode_group(table, shapes, out, status)
    firsts = [start * TILE_WEIGHTS for start in starts]
    matrices = [
        out[first : first + rows * cols].view(rows, cols)
        for first, (rows, cols) in zip(firsts, shapes, strict=False)
    ]
    words = [
        status[start : start + fast_ops.num_tiles(*shape)]
        for start, shape in zip(starts, shapes, strict=False)
    ]
    return matrices, words, out


@pytest.mark.parametrize("backend", ["numba", "triton"])
@pytest.mark.parametrize("name", GROUPS)
def test_group_decodes_to_the_bits_of_its_members_and_writes_nothing_else(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_DFLOAT_BACKEND", backend)
    weights = {key: to_torch(bits) for key, bits in GROUPS[name].items()}
    matrices, words, out = decode(held(weights))
    for matrix, status, (key, weight) in zip(matrices, words, weights.items(), strict=True):
        assert same_bits(matrix, weight), key
        assert not status.any(), key
    others = sum((bits != POISON).sum() for bits in GROUPS[name].values())
    assert (out.view(torch.uint16) != POISON).sum() == others


@pytest.mark.parametrize(
    "parameters",
    [
        dict(fast_rows_per_program=16, fast_rows_at_once=4, fast_tiles_per_program=4, fast_weights_at_once=8),
        dict(fast_tiles_per_program=1, fast_rows_per_program=32, fast_rows_at_once=32),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", ["whole blocks", "eights", "one"])
def test_launch_parameters_change_no_bit(
    name: str, parameters: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_DFLOAT_BACKEND", "triton")
    weights = {key: to_torch(bits) for key, bits in GROUPS[name].items()}
    with override(replace(INTERPRETED, **parameters)):
        matrices, _, _ = decode(held(weights))
    for matrix, weight in zip(matrices, weights.values(), strict=True):
        assert same_bits(matrix, weight)


@pytest.mark.parametrize("backend", ["numba", "triton"])
def test_descriptors_may_change_after_the_table_is_made(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Bug caught: a table with copies of the descriptors' contents, so that a reload has no effect.
    monkeypatch.setenv("VLLM_DFLOAT_BACKEND", backend)
    first, second = (to_torch(gaussian(70, 300, seed=s)) for s in (1, 2))
    packed, later = held({"w": first}), held({"w": second})
    table = fast_groups.group_table([packed[0].desc], [(70, 300)])
    assert same_bits(decode(packed, table)[0][0], first)
    later[0].described_in(packed[0].desc)
    assert same_bits(decode(packed, table)[0][0], second)


def test_no_group_is_larger_than_a_table() -> None:
    (one,) = held({"w": to_torch(gaussian(8, 256))})
    with pytest.raises(UnsupportedError, match=f"group of {MAX_MEMBERS + 1} matrices .* 1 to 16"):
        fast_groups.group_table([one.desc] * (MAX_MEMBERS + 1), [(8, 256)] * (MAX_MEMBERS + 1))
    with pytest.raises(UnsupportedError, match=r"group of 1 matrices \[\(0, 256\)\]"):
        fast_groups.group_table([one.desc], [(0, 256)])


@pytest.mark.parametrize("backend", ["numba", "triton"])
def test_damage_is_reported_for_its_member_only(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_DFLOAT_BACKEND", backend)
    weights = {f"layers.0.{s}": to_torch(heavy_tailed(64, 256, seed=s)) for s in range(3)}
    packed = held(weights)
    lay = fast_ops.fast_at(packed[1].desc, 64, 256).layout
    packed[1].payload[lay.starts_offset + 4 : lay.starts_offset + 8] = 255  # a start past the end
    matrices, (before, damaged, after), _ = decode(packed)
    assert not before.any()
    assert damaged.any()
    assert not after.any()
    assert same_bits(matrices[0], weights["layers.0.0"])
    assert same_bits(matrices[2], weights["layers.0.2"])


@pytest.mark.parametrize("backend", ["numba", "triton"])
@pytest.mark.parametrize("word", range(8))
def test_a_changed_table_is_not_followed(
    word: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Bug caught: a wrong address is followed, or a matrix is written outside the buffer.
    monkeypatch.setenv("VLLM_DFLOAT_BACKEND", backend)
    packed = held({f"layers.0.{s}": to_torch(gaussian(70, 300, seed=s)) for s in range(2)})
    shapes = [(70, 300)] * 2
    table = fast_groups.group_table([one.desc for one in packed], shapes)
    table.view(-1)[word] ^= 1 << (7 * word)
    if backend == "numba":
        with pytest.raises(FormatError, match=r"group of .*layers\.0\.\d: row \d of its table is"):
            decode(packed, table)
        return
    _, words, out = decode(packed, table)
    assert out.isnan().all()
    assert all((status == 4).all() for status in words)


@pytest.mark.parametrize("backend", ["numba", "triton"])
def test_a_changed_descriptor_is_not_followed(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_DFLOAT_BACKEND", backend)
    weights = {f"layers.0.{s}": to_torch(gaussian(70, 300, seed=s)) for s in range(2)}
    packed = held(weights)
    packed[1].desc[2] ^= 1 << 40
    if backend == "numba":
        with pytest.raises(FormatError, match=r"layers\.0\.1: descriptor"):
            decode(packed)
        return
    matrices, (sound, changed), _ = decode(packed)
    assert same_bits(matrices[0], weights["layers.0.0"])
    assert not sound.any()
    assert matrices[1].isnan().all()
    assert (changed == 4).all()
