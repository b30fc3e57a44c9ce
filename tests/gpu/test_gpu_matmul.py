"""The fused kernels on a GPU: within their error bound, the same bits every time, each row apart from the others."""

import pytest
import torch
from gpu_helpers import DEVICE, NEEDS_GPU, captured, gaussian, nan_memory, no_rehearsal, of_size
from helpers import assert_within_bound, hard_matrices, same_bits, to_torch

from vllm_dfloat.codec import layout
from vllm_dfloat.device import fused, ops
from vllm_dfloat.kernels import packed_matmul as kernels

pytestmark = NEEDS_GPU
EIGHTH = layout.TILE_WEIGHTS // 8
# Columns for which tiles touch 1, 2, ... rows of the matrix: each number has its own kernel.
COLUMNS = {
    kernels.num_segments(cols): cols
    for cols in range(EIGHTH, 16 * EIGHTH + 1, EIGHTH)
    if kernels.is_supported(cols)
}
# One row count per kernel variant, and some that leave rows of a kernel empty.
NUM_ROWS = of_size(sorted({*fused.compiled_for(kernels.MAX_ROWS), 3}), [3])
LLAMA_8B = [(6144, 4096), (4096, 4096), (28_672, 4096), (4096, 14_336)]


def activations(num_rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, cols, generator=generator).bfloat16().to(DEVICE)


def multiply(
    packed: ops.PackedWeight, x: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the kernels' result, computed in poisoned memory, every status checked."""
    numel = ops.padded_numel(packed.rows, packed.cols)
    memory = torch.full((numel,), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    num_tiles = ops.num_tiles(packed.rows, packed.cols)
    status = torch.full((num_tiles,), -1, dtype=torch.int32, device=DEVICE)
    scratch = memory, status
    with nan_memory():
        out = fused.matmul(x, packed.desc, packed.rows, packed.cols, bias, scratch)
    assert not status.any()
    return out


@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("segments", of_size(list(COLUMNS), [2]))
def test_gpu_result_of_every_kernel_is_within_the_bound_and_the_same_every_time(
    segments: int, num_rows: int
) -> None:
    cols = COLUMNS[segments]
    weight = to_torch(gaussian(of_size([1009], [5])[0], cols)).to(DEVICE)
    packed, x = ops.pack(weight, "w"), activations(num_rows, cols)
    bias = activations(1, len(weight), seed=3)[0] if num_rows % 2 else None
    first = multiply(packed, x, bias)
    assert_within_bound(first, weight, x, bias)
    for _ in range(of_size([10], [1])[0]):
        assert same_bits(multiply(packed, x, bias), first)


@no_rehearsal
@pytest.mark.parametrize("num_rows", [1, 4])
@pytest.mark.parametrize("shape", LLAMA_8B)
def test_gpu_multiplies_layers_of_real_size(shape: tuple[int, int], num_rows: int) -> None:
    weight = to_torch(gaussian(*shape)).cuda()
    packed, x = ops.pack(weight, "w"), activations(num_rows, shape[1])
    out = multiply(packed, x)
    assert_within_bound(out, weight, x)
    assert same_bits(multiply(packed, x), out)


@pytest.mark.parametrize("num_rows", of_size([2, 3, 4], [2]))
def test_gpu_result_of_a_row_does_not_depend_on_the_other_rows(num_rows: int) -> None:
    # Bug caught: 0 times infinity, where rows or columns that do not count are multiplied by 0.
    cols = COLUMNS[2]
    packed = ops.pack(to_torch(gaussian(of_size([777], [5])[0], cols)).to(DEVICE), "w")
    x = activations(num_rows, cols)
    alone = multiply(packed, x)
    for other in (activations(num_rows, cols, seed=1), torch.full_like(x, float("inf"))):
        other[1] = x[1]
        assert same_bits(multiply(packed, other)[1], alone[1])
    assert same_bits(multiply(packed, torch.cat([x[1:], x[:1]]))[0], alone[1])


@pytest.mark.parametrize("num_rows", of_size([1, 4], [1]))
def test_gpu_multiplies_a_matrix_held_as_bf16(num_rows: int) -> None:
    cols = COLUMNS[3]
    bits = (
        hard_matrices()["uniform bits"].reshape(-1)[: 2 * cols].reshape(2, cols) & 0xBF7F
    )  # finite
    packed = ops.pack(to_torch(bits).to(DEVICE), "w")
    assert packed.is_raw
    x = activations(num_rows, cols)
    assert_within_bound(multiply(packed, x), to_torch(bits).to(DEVICE), x, None)


@no_rehearsal
@pytest.mark.parametrize("num_rows", [1, 4])
def test_gpu_multiplies_a_matrix_of_more_than_two_billion_weights(num_rows: int) -> None:
    # Bug caught: offsets computed in 32 bits. The matrix repeats its first part, so each repeat has the same result.
    block, repeats = to_torch(gaussian(1025, 16_384)).cuda(), 128
    assert block.numel() % layout.TILE_WEIGHTS == 0
    whole = ops.pack(block.repeat(repeats, 1), "w")
    assert whole.rows * whole.cols > 1 << 31
    x = activations(num_rows, whole.cols)
    found = multiply(whole, x).view(num_rows, repeats, len(block))
    expected = multiply(ops.pack(block, "w"), x)
    assert_within_bound(expected, block, x, None)
    for i in range(repeats):
        assert same_bits(found[:, i].contiguous(), expected)


@no_rehearsal
@pytest.mark.parametrize("num_rows", [1, 4])
def test_gpu_multiplies_in_a_captured_graph_and_sees_new_weights_after_a_reload(
    num_rows: int,
) -> None:
    cols = COLUMNS[1]
    first, second = (ops.pack(to_torch(gaussian(512, cols, seed=s)).cuda(), "w") for s in (1, 2))
    expected = [multiply(packed, activations(num_rows, cols)) for packed in (first, second)]
    x, results = activations(num_rows, cols), []
    scratch = (
        torch.empty(ops.padded_numel(512, cols), dtype=torch.bfloat16, device="cuda"),
        torch.empty(ops.num_tiles(512, cols), dtype=torch.int32, device="cuda"),
    )
    graph = captured(lambda: results.append(fused.matmul(x, first.desc, 512, cols, None, scratch)))
    for source, wanted in zip((first, second), expected, strict=True):
        source.described_in(first.desc)
        results[-1].fill_(float("nan"))
        graph.replay()
        assert same_bits(results[-1], wanted)
