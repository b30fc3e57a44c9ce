"""Groups of matrices in one launch, on a GPU: the bits of each member, in poisoned memory."""

import pytest
import torch
from fast_matrices import fast_matrices
from gpu_helpers import DEVICE, NEEDS_GPU, buffers, captured, gaussian, no_rehearsal, of_size
from helpers import hard_matrices, same_bits, to_torch, unlike

from vllm_dfloat.codec import layout
from vllm_dfloat.codec.descriptor import MAX_MEMBERS
from vllm_dfloat.device import fast_groups, fast_ops, groups, ops

pytestmark = NEEDS_GPU
POISON = 0x7FC1
LLAMA_8B = [(6144, 4096), (4096, 4096), (28_672, 4096), (4096, 14_336)]
GROUPS = of_size(
    [LLAMA_8B, [(4097, 1023)], [(1, 1), (37, 333), (4096, 2048)]], [[(3, 700), (1, 1)]]
)


def decode(packed: list[ops.PackedWeight], poison: int) -> list[torch.Tensor]:
    """Return the matrices of a group, decoded into poisoned memory; check every status."""
    shapes = [(member.rows, member.cols) for member in packed]
    starts = groups.first_tiles(shapes)
    out, status = buffers(starts[-1], starts[-1] * layout.TILE_WEIGHTS, poison)
    table = groups.group_table([member.desc for member in packed], shapes)
    groups.decode_group(table, starts[-1], out, status)
    assert not status.any()
    firsts = [start * layout.TILE_WEIGHTS for start in starts]
    return [
        out[first : first + rows * cols].view(rows, cols)
        for first, (rows, cols) in zip(firsts, shapes, strict=False)
    ]


def test_gpu_decodes_hard_matrices_as_one_group() -> None:
    hard = {
        name: bits
        for name, bits in hard_matrices().items()
        if bits.size and bits.size < of_size([1 << 30], [7000])[0] and 0x7FC1 not in bits
    }
    names = list(hard)[:MAX_MEMBERS]
    weights = [to_torch(hard[name]).to(DEVICE) for name in names]
    packed = [ops.pack(weight, name) for weight, name in zip(weights, names, strict=True)]
    for name, weight, found in zip(names, weights, decode(packed, POISON), strict=True):
        assert same_bits(found, weight), name


@pytest.mark.parametrize("shapes", GROUPS)
def test_gpu_decodes_groups_of_real_size(shapes: list[tuple[int, int]]) -> None:
    bits = [gaussian(*shape, seed=i) for i, shape in enumerate(shapes)]
    weights = [to_torch(member).to(DEVICE) for member in bits]
    poison = max(unlike(member) for member in bits)
    found = decode([ops.pack(weight, "w") for weight in weights], poison)
    for member, weight in zip(found, weights, strict=True):
        assert same_bits(member, weight)


def decode_fast(packed: list[ops.PackedWeight], poison: int) -> list[torch.Tensor]:
    """Return the matrices of a group of the fast layout, decoded into poisoned memory; check every status."""
    shapes = [(member.rows, member.cols) for member in packed]
    starts = fast_groups.first_tiles(shapes)
    out, status = buffers(starts[-1], starts[-1] * layout.TILE_WEIGHTS, poison)
    status.zero_()  # not every word belongs to a tile of the layout
    table = fast_groups.group_table([member.desc for member in packed], shapes)
    fast_groups.decode_group(table, shapes, out, status)
    assert not status.any()
    firsts = [start * layout.TILE_WEIGHTS for start in starts]
    return [
        out[first : first + rows * cols].view(rows, cols)
        for first, (rows, cols) in zip(firsts, shapes, strict=False)
    ]


def test_gpu_decodes_hard_matrices_of_the_fast_layout_as_one_group() -> None:
    weights = {name: to_torch(bits).to(DEVICE) for name, bits in fast_matrices().items()}
    packed = [fast_ops.pack_again(weight, name) for name, weight in weights.items()]
    for found, (name, weight) in zip(
        decode_fast(packed, POISON), list(weights.items()), strict=True
    ):
        assert same_bits(found, weight), name


@pytest.mark.parametrize("shapes", GROUPS)
def test_gpu_decodes_groups_of_the_fast_layout_of_real_size(shapes: list[tuple[int, int]]) -> None:
    bits = [gaussian(*shape, seed=i) for i, shape in enumerate(shapes)]
    weights = [to_torch(member).to(DEVICE) for member in bits]
    poison = max(unlike(member) for member in bits)
    found = decode_fast([fast_ops.pack_again(weight, "w") for weight in weights], poison)
    for member, weight in zip(found, weights, strict=True):
        assert same_bits(member, weight)


@no_rehearsal
def test_gpu_group_of_the_fast_layout_in_a_captured_graph_sees_new_weights_after_a_reload() -> None:
    shapes = [(512, 640), (300, 1000)]
    old, new = (
        [fast_ops.pack_again(to_torch(gaussian(*shape, seed=s)).cuda(), "w") for shape in shapes]
        for s in (1, 2)
    )
    starts = fast_groups.first_tiles(shapes)
    out, status = buffers(starts[-1], starts[-1] * layout.TILE_WEIGHTS, POISON)
    table = fast_groups.group_table([member.desc for member in old], shapes)
    graph = captured(lambda: fast_groups.decode_group(table, shapes, out, status))
    for generation, seed in ((old, 1), (new, 2)):
        for held, source in zip(old, generation, strict=True):
            source.described_in(held.desc)
        out.fill_(1.0)
        graph.replay()
        for start, (rows, cols) in zip(starts, shapes, strict=False):
            first = start * layout.TILE_WEIGHTS
            found = out[first : first + rows * cols].view(rows, cols)
            assert same_bits(found, to_torch(gaussian(rows, cols, seed=seed)).cuda())


@no_rehearsal
def test_gpu_decodes_a_group_of_more_than_two_billion_weights() -> None:
    # Bug caught: a member's offset in the output computed in 32 bits. Members share one payload, but not the offset.
    bits = gaussian(16_400, 16_384)
    weight = to_torch(bits).cuda()
    packed = ops.pack(weight, "w")
    members = [packed] * 8
    assert len(members) * bits.size > 1 << 31
    for member in decode(members, unlike(bits)):
        assert same_bits(member, weight)


@no_rehearsal
def test_gpu_group_in_a_captured_graph_sees_new_weights_after_a_reload() -> None:
    shapes = [(512, 640), (300, 1000)]
    old, new = (
        [ops.pack(to_torch(gaussian(*shape, seed=s)).cuda(), "w") for shape in shapes]
        for s in (1, 2)
    )
    starts = groups.first_tiles(shapes)
    out, status = buffers(starts[-1], starts[-1] * layout.TILE_WEIGHTS, POISON)
    table = groups.group_table([member.desc for member in old], shapes)
    graph = captured(lambda: groups.decode_group(table, starts[-1], out, status))
    for generation, seed in ((old, 1), (new, 2)):
        for held, source in zip(old, generation, strict=True):
            source.described_in(held.desc)
        out.fill_(1.0)
        graph.replay()
        for start, (rows, cols) in zip(starts, shapes, strict=False):
            first = start * layout.TILE_WEIGHTS
            found = out[first : first + rows * cols].view(rows, cols)
            assert same_bits(found, to_torch(gaussian(rows, cols, seed=seed)).cuda())
