"""Chosen experts of a packed tensor: their bits, and nothing else written."""

import numpy as np
import pytest
import torch
from helpers import Bits, gaussian, hard_matrices, poisoned, same_bits, to_torch, unlike

from vllm_dfloat.codec.layout import TILE_WEIGHTS
from vllm_dfloat.device import experts, ops
from vllm_dfloat.errors import FormatError, UnsupportedError

CPU = torch.device("cpu")
Shape = tuple[int, int, int]

# Experts of whole tiles, of half tiles, that straddle tiles, several to a tile, and one that is all.
SHAPES: list[Shape] = [
    (6, 32, 128),
    (5, 8, 128),
    (4, 9, 700),
    (40, 3, 5),
    (3, 1, 2047),
    (1, 30, 100),
]
CHOICES = ([0], [-1], [0, 2], [1], [], list(range(64)))


@pytest.fixture(autouse=True, params=["numba", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("VLLM_DFLOAT_BACKEND", request.param)
    return str(request.param)


def flags(num_experts: int, which: list[int]) -> torch.Tensor:
    chosen = torch.zeros(num_experts, dtype=torch.int32)
    chosen[[i for i in which if i < num_experts]] = 1
    return chosen


def tiles_of(chosen: torch.Tensor, numel: int) -> set[int]:
    """Return the tiles that hold a weight of a chosen expert, weight by weight."""
    weights = np.arange(chosen.numel() * numel)
    return set(np.unique(weights[chosen.numpy()[weights // numel] != 0] // TILE_WEIGHTS).tolist())


def decode(
    packed: ops.PackedWeight, shape: Shape, chosen: torch.Tensor, poison: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tiles, BF16 [tiles, 2048], of a decode into poisoned memory, and their status words."""
    num_experts, rows, cols = shape
    tiles = ops.num_tiles(num_experts * rows, cols)
    out = poisoned((tiles * TILE_WEIGHTS,), poison, CPU)
    status = torch.full((tiles,), 77, dtype=torch.int32)
    experts.decode_chosen(packed.desc, num_experts, rows, cols, chosen, out, status)
    return out.view(tiles, TILE_WEIGHTS), status


def check(bits: Bits, shape: Shape, chosen: torch.Tensor, poison: int | None = None) -> None:
    """Decode; compare the tiles of chosen experts with the original, all others with the poison."""
    _, rows, cols = shape
    packed = ops.pack(to_torch(bits), "w13")
    poison = unlike(bits) if poison is None else poison
    out, status = decode(packed, shape, chosen, poison)
    wanted = tiles_of(chosen, rows * cols)
    assert experts.count_decoded(status, *shape) == len(wanted)
    for tile in range(len(out)):
        start = tile * TILE_WEIGHTS
        expected = to_torch(bits).view(-1)[start : start + TILE_WEIGHTS]
        if tile in wanted:
            assert status[tile] == 0
            assert same_bits(out[tile, : expected.numel()], expected)
        else:
            assert status[tile] == experts.STATUS_SKIPPED
            assert same_bits(out[tile], poisoned((TILE_WEIGHTS,), poison, CPU))


@pytest.mark.parametrize("shape", SHAPES)
def test_chosen_experts_have_their_bits_and_all_other_tiles_stay_poison(shape: Shape) -> None:
    bits = gaussian(shape[0] * shape[1], shape[2])
    for which in CHOICES:
        check(bits, shape, flags(shape[0], which))


def test_experts_held_as_bf16_are_copied_tile_by_tile() -> None:
    bits = hard_matrices()["uniform bits"]  # [64, 65]
    assert ops.pack(to_torch(bits)).is_raw
    for which in CHOICES:
        check(bits, (4, 16, 65), flags(4, which))


def test_experts_with_rare_exponents_are_decoded_with_long_codes() -> None:
    bits = hard_matrices()["all 65,536 patterns"]
    check(bits, (8, 32, 256), flags(8, [1, 6]), 0x7FC1)


def test_any_flag_but_zero_chooses_an_expert_and_none_leads_outside() -> None:
    bits = gaussian(6 * 32, 128)
    check(bits, (6, 32, 128), torch.tensor([0, -1, 2**31 - 1, 0, -(2**31), 0], dtype=torch.int32))


def test_status_words_of_the_unchosen_are_left_alone_in_a_forward_pass() -> None:
    packed = ops.pack(to_torch(gaussian(64, 128)))
    out = torch.empty(8192, dtype=torch.bfloat16)
    status = torch.full((4,), 9, dtype=torch.int32)
    experts.launch_decode_chosen(packed.desc, 2, 32, 128, flags(2, [1]), out, status)
    assert status.tolist() == [9, 9, 0, 0]


def test_a_changed_descriptor_is_never_followed(backend: str) -> None:
    shape = (4, 32, 128)
    for word in range(4):
        packed = ops.pack(to_torch(gaussian(4 * 32, 128)), "layers.3.mlp.experts.w13")
        packed.desc[word] ^= 1 << 20
        if backend == "numba":
            with pytest.raises(FormatError, match=r"layers\.3\.mlp\.experts\.w13: descriptor"):
                decode(packed, shape, flags(4, [2]), 0x1234)
            continue
        out, status = decode(packed, shape, flags(4, [2]), 0x1234)
        assert status.tolist() == [-1, -1, -1, -1, 4, 4, -1, -1]
        assert same_bits(out[:4], poisoned((4, TILE_WEIGHTS), 0x1234, CPU))
        assert out[4:6].isnan().all()


def test_a_descriptor_read_with_another_number_of_experts_is_refused(backend: str) -> None:
    # Bug caught: a seal that covers the tiles asked for, not those of the tensor.
    packed = ops.pack(to_torch(gaussian(4 * 32, 128)), "w2")
    if backend == "numba":
        with pytest.raises(FormatError, match="w2: descriptor"):
            decode(packed, (3, 32, 128), flags(3, [2]), 0x1234)
    else:
        _, status = decode(packed, (3, 32, 128), flags(3, [2]), 0x1234)
        assert status.tolist() == [-1, -1, -1, -1, 4, 4]


def test_damage_in_an_expert_is_reported_by_its_own_tiles_only() -> None:
    packed = ops.pack(to_torch(gaussian(4 * 32, 128)), "w2")
    lay_lengths = packed.payload[512 + 8 * TILE_WEIGHTS :][: 8 * 16]  # the lane lengths of 8 tiles
    lay_lengths[4 * 16] += 1  # expert 2's first tile
    _, status = decode(packed, (4, 32, 128), flags(4, [2, 3]), 0x1234)
    assert status[4] > 0
    assert status[5:].tolist() == [0, 0, 0]
    _, status = decode(packed, (4, 32, 128), flags(4, [1]), 0x1234)
    assert status.tolist() == [-1, -1, 0, 0, -1, -1, -1, -1]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint32])
@pytest.mark.parametrize("tokens", [1, 7, 3000])
def test_experts_that_got_tokens_are_marked(dtype: torch.dtype, tokens: int) -> None:
    ids = torch.randint(0, 30, (tokens, 4), generator=torch.Generator().manual_seed(tokens))
    chosen = torch.full((32,), 5, dtype=torch.int32)
    experts.mark_chosen(ids.to(dtype), None, chosen)
    expected = torch.zeros(32, dtype=torch.int32)
    expected[ids.unique()] = 1
    assert torch.equal(chosen, expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_no_expert_mark_nothing(dtype: torch.dtype) -> None:
    ids = torch.tensor([[-1, 3], [8, 2**31 - 1], [-(2**31), 0]], dtype=dtype)
    chosen = torch.full((8,), 5, dtype=torch.int32)
    experts.mark_chosen(ids, None, chosen)
    assert chosen.tolist() == [1, 0, 0, 1, 0, 0, 0, 0]


def test_ids_beyond_32_bits_mark_nothing() -> None:
    # Bug caught: ids cut to 32 bits, so that 2**32 + 1 is expert 1.
    chosen = torch.zeros(8, dtype=torch.int32)
    experts.mark_chosen(torch.tensor([2**32 + 1, 2**40, 5, -(2**63)]), None, chosen)
    assert chosen.tolist() == [0, 0, 0, 0, 0, 1, 0, 0]


def test_global_ids_are_mapped_to_local_experts_and_other_ranks_left_out() -> None:
    expert_map = torch.tensor([-1, -1, 0, 1, 2, -1, 9, -(2**31)], dtype=torch.int32)  # 9: no such
    chosen = torch.full((3,), 5, dtype=torch.int32)
    ids = torch.tensor([[0, 3], [5, 2], [6, 7], [8, -1], [2**31, 3]])
    experts.mark_chosen(ids, expert_map, chosen)
    assert chosen.tolist() == [1, 1, 0]


def test_no_tokens_choose_no_expert() -> None:
    chosen = torch.full((4,), 5, dtype=torch.int32)
    experts.mark_chosen(torch.empty(0, 8, dtype=torch.int32), None, chosen)
    assert not chosen.any()


def test_ids_that_do_not_lie_side_by_side_are_read_in_place() -> None:
    ids = torch.tensor([[1, 7, 2], [3, 7, 4]], dtype=torch.int32)[:, ::2]
    chosen = torch.zeros(8, dtype=torch.int32)
    experts.mark_chosen(ids, None, chosen)
    assert chosen.tolist() == [0, 1, 1, 1, 1, 0, 0, 0]


def test_wrong_buffers_are_refused_in_one_sentence() -> None:
    packed = ops.pack(to_torch(gaussian(64, 128)))
    out, status = torch.empty(8192, dtype=torch.bfloat16), torch.empty(4, dtype=torch.int32)
    chosen = flags(2, [0])
    arguments = packed.desc, 2, 32, 128
    with pytest.raises(UnsupportedError, match=r"decode_chosen: chosen: .* expected torch\.int32"):
        experts.decode_chosen(*arguments, chosen.long(), out, status)
    with pytest.raises(UnsupportedError, match=r"decode_chosen: chosen: .* \[at least 2\]"):
        experts.decode_chosen(*arguments, chosen[:1], out, status)
    with pytest.raises(UnsupportedError, match=r"decode_chosen: out: .* \[at least 8192\]"):
        experts.decode_chosen(*arguments, chosen, out[:-1], status)
    with pytest.raises(UnsupportedError, match=r"decode_chosen: status: .* \[at least 4\]"):
        experts.decode_chosen(*arguments, chosen, out, status[:3])
    with pytest.raises(UnsupportedError, match=r"mark_chosen: topk_ids torch\.float32"):
        experts.mark_chosen(torch.zeros(3), None, chosen)
    with pytest.raises(UnsupportedError, match=r"mark_chosen: expert_map: torch\.int64"):
        experts.mark_chosen(chosen, torch.zeros(3, dtype=torch.int64), chosen)
