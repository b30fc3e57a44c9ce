"""Chosen experts on a GPU, decoded into memory that stays poisoned elsewhere, or multiplied; also in CUDA graphs."""

import pytest
import torch
from gpu_helpers import DEVICE, NEEDS_GPU, buffers, captured, gaussian, no_rehearsal, of_size
from helpers import poisoned, same_bits, to_torch, unlike

from vllm_dfloat.codec.layout import TILE_WEIGHTS
from vllm_dfloat.device import experts, fast_expert_product, fast_fused, fast_ops, ops
from vllm_dfloat.kernels.routed import Routed

pytestmark = NEEDS_GPU

# Experts, rows and columns: w13 and w2 of Qwen3-30B-A3B at TP 4, of Qwen3-235B-A22B at TP 8; experts that share tiles.
SHAPES = of_size(
    [(128, 384, 2048), (128, 2048, 192), (128, 384, 4096), (16, 333, 77)],
    [(8, 8, 512), (4, 33, 77)],
)


def ids_of(num_experts: int, tokens: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, num_experts, (tokens, 2), generator=generator).to(DEVICE)


def check(
    weight: torch.Tensor, out: torch.Tensor, status: torch.Tensor, ids: torch.Tensor, poison: int
) -> None:
    """Compare the experts of `ids` with `weight` [experts, rows, cols], and tiles of others with the poison."""
    numel = weight[0].numel()
    touched = torch.zeros(status.numel(), dtype=torch.bool, device=DEVICE)
    for expert in ids.unique().tolist():
        start, end = expert * numel, (expert + 1) * numel
        assert same_bits(out[start:end], weight[expert].view(-1)), expert
        touched[start // TILE_WEIGHTS : (end - 1) // TILE_WEIGHTS + 1] = True
    assert torch.equal(status == 0, touched)
    rest = out.view(-1, TILE_WEIGHTS)[~touched]
    assert same_bits(rest, poisoned(tuple(rest.shape), poison, DEVICE))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, of_size([3000], [70])[0]])
def test_gpu_decodes_the_experts_that_got_tokens_and_no_others(
    shape: tuple[int, int, int], tokens: int
) -> None:
    num_experts, rows, cols = shape
    bits = gaussian(num_experts * rows, cols)
    weight = to_torch(bits).to(DEVICE)
    packed = ops.pack(weight, "w13")
    tiles = ops.num_tiles(num_experts * rows, cols)
    out, status = buffers(tiles, tiles * TILE_WEIGHTS, unlike(bits))
    ids = ids_of(num_experts, tokens, seed=tokens)
    chosen = torch.full((num_experts,), 9, dtype=torch.int32, device=DEVICE)
    experts.mark_chosen(ids, None, chosen)
    experts.decode_chosen(packed.desc, *shape, chosen, out, status)
    check(weight.view(shape), out, status, ids, unlike(bits))


@no_rehearsal
def test_a_cuda_graph_decodes_what_the_router_chooses_at_each_replay() -> None:
    # Bug caught: a grid, or a list of experts, of the capture.
    shape = 128, 384, 2048
    bits = gaussian(128 * 384, 2048)
    weight = to_torch(bits).to(DEVICE)
    packed = ops.pack(weight, "w13")
    tiles = ops.num_tiles(128 * 384, 2048)
    out, status = buffers(tiles, tiles * TILE_WEIGHTS, unlike(bits))
    ids = ids_of(128, 4, seed=0)
    chosen = torch.empty(128, dtype=torch.int32, device=DEVICE)

    def work() -> None:
        experts.mark_chosen(ids, None, chosen)
        experts.launch_decode_chosen(packed.desc, *shape, chosen, out, status)

    graph = captured(work)
    for seed in range(1, 4):
        ids.copy_(ids_of(128, 4, seed))
        out.copy_(poisoned(tuple(out.shape), unlike(bits), DEVICE))
        status.fill_(experts.STATUS_SKIPPED)
        graph.replay()
        check(weight.view(shape), out, status, ids, unlike(bits))


@no_rehearsal
def test_a_cuda_graph_multiplies_by_the_experts_that_the_router_chooses_at_each_replay() -> None:
    # Bug caught: a grid, or which blocks have tokens, of the capture.
    num_experts, rows, cols = 16, 384, 2048
    weight = to_torch(gaussian(num_experts * rows, cols)).to(DEVICE)
    held = fast_ops.pack_again(weight, "w13")
    each = [fast_ops.pack_again(part, "expert") for part in weight.split(rows)]
    nothing = torch.empty(0, dtype=torch.int32, device=DEVICE)
    x = torch.randn(4, cols, device=DEVICE).bfloat16()
    sorted_ids = torch.full((4 * 16,), 4, dtype=torch.int32, device=DEVICE)
    expert_of_block = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    padded = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    routed = Routed(sorted_ids, padded, expert_of_block, 16, 4, 1, None)
    out = torch.full((4, rows), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    shape = num_experts, rows, cols
    graph = captured(lambda: fast_expert_product.launch(x, held.desc, *shape, routed, None, out))
    for chosen in ([3, 3, 3, 3], [0, 15, 0, 7], [1, 2, 3, 4]):
        sorted_ids.fill_(4)
        blocks = sorted(set(chosen))
        for at, expert in enumerate(blocks):
            mine = [token for token, other in enumerate(chosen) if other == expert]
            sorted_ids[16 * at : 16 * at + len(mine)] = torch.tensor(mine, device=DEVICE).int()
            expert_of_block[at] = expert
        padded.fill_(16 * len(blocks))
        out.fill_(torch.nan)
        graph.replay()
        for token, expert in enumerate(chosen):
            scratch = nothing.view(torch.bfloat16), nothing
            alone = fast_fused.launch_in_order(x, each[expert].desc, rows, cols, None, scratch)
            assert same_bits(out[token], alone[token]), (chosen, token)


@no_rehearsal
def test_gpu_decodes_experts_beyond_two_billion_weights() -> None:
    # Bug caught: an expert's place in the output computed in 32 bits.
    shape = 74, 4096, 7168
    bits = gaussian(4096, 7168)
    weight = to_torch(bits).to(DEVICE).repeat(74, 1)
    assert weight.numel() > 1 << 31
    packed = ops.pack(weight, "w13")
    out, status = buffers(packed.size, packed.size * TILE_WEIGHTS, unlike(bits))
    ids = torch.tensor([0, 73], device=DEVICE)
    chosen = torch.empty(74, dtype=torch.int32, device=DEVICE)
    experts.mark_chosen(ids, None, chosen)
    experts.decode_chosen(packed.desc, *shape, chosen, out, status)
    check(weight.view(shape), out, status, ids, unlike(bits))
