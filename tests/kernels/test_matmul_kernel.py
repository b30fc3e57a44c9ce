"""The fused kernels in Triton's interpreter: within their error bound, deterministic, rows independent of others."""

import pytest
import torch
from helpers import Bits, assert_within_bound, gaussian, hard_matrices, same_bits, to_torch

from vllm_dfloat.device import fused, ops
from vllm_dfloat.errors import FormatError, UnsupportedError
from vllm_dfloat.kernels import packed_matmul as kernels

HARD = hard_matrices()
# Columns: whole tiles per row; tiles that begin within a row; two and three rows per tile; no power of two.
SHAPES = [(4, 2048), (3, 4096), (5, 3584), (7, 1024), (5, 768), (3, 2304)]
NUM_ROWS = [1, 2, 3, 4]


def activations(num_rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, cols, generator=torch.Generator().manual_seed(seed)).bfloat16()


def multiply(
    weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the kernels' result, computed in poisoned memory, every status checked."""
    rows, cols = weight.shape
    packed = ops.pack(weight, "w")
    num_tiles = ops.num_tiles(rows, cols)
    out = torch.full((x.shape[0], rows), float("nan"), dtype=torch.bfloat16)
    partials = torch.full((kernels.num_partials(num_tiles, cols, x.shape[0]),), float("nan"))
    status = torch.full((num_tiles,), -1, dtype=torch.int32)
    kernels.matmul(x, packed.desc, bias, cols, out, partials, status)
    assert not status.any()
    return out


@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_result_is_within_the_derived_bound(shape: tuple[int, int], num_rows: int) -> None:
    weight = to_torch(gaussian(*shape))
    x = activations(num_rows, shape[1])
    bias = activations(1, shape[0])[0] if num_rows % 2 else None
    assert_within_bound(multiply(weight, x, bias), weight, x, bias)


@pytest.mark.parametrize("num_rows", [2, 4])
def test_result_of_a_row_does_not_depend_on_the_other_rows(num_rows: int) -> None:
    # Bug caught: 0 times infinity, where rows or columns that do not count are multiplied by 0.
    weight = to_torch(gaussian(3, 1792))
    x = activations(num_rows, 1792)
    alone = multiply(weight, x)
    for other in (activations(num_rows, 1792, seed=1), torch.full_like(x, float("inf"))):
        other[1] = x[1]
        assert same_bits(multiply(weight, other)[1], alone[1])
    again = torch.cat([x[1:], x[:1]])
    assert same_bits(multiply(weight, again)[0], alone[1])  # nor on the row's index


@pytest.mark.parametrize("num_rows", [1, 3])
def test_infinite_weights_and_no_numbers_stay_in_their_rows(num_rows: int) -> None:
    weight = to_torch(gaussian(7, 1024))
    weight[2, 1023], weight[3, 0], weight[5, 5] = float("inf"), float("-inf"), float("nan")
    x = activations(num_rows, 1024)
    out = multiply(weight, x)
    finite = [0, 1, 4, 6]
    assert_within_bound(out[:, finite], weight[finite], x)
    assert torch.equal(out[:, 2], x[:, 1023].float().sign().bfloat16() * float("inf"))
    assert torch.equal(out[:, 3], x[:, 0].float().sign().bfloat16() * float("-inf"))
    assert out[:, 5].isnan().all()


@pytest.mark.parametrize("num_rows", [1, 3])
def test_matrix_held_as_bf16_is_multiplied_too(num_rows: int) -> None:
    bits = HARD["uniform bits"].reshape(-1)[:2048].reshape(2, 1024) & 0xBF7F  # finite
    weight = to_torch(bits)
    assert ops.pack(weight).is_raw
    x = activations(num_rows, 1024)
    assert_within_bound(multiply(weight, x), weight, x)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_result_is_rounded_to_nearest_with_ties_to_even(num_rows: int) -> None:
    # One weight of 1 and a bias: sums that lie halfway between two BF16 numbers.
    weight = torch.zeros(4, 2048, dtype=torch.bfloat16)
    weight[:, 0] = 1.0
    x = torch.zeros(num_rows, 2048, dtype=torch.bfloat16)
    x[:, 0] = 2.0**-8
    bias = torch.tensor([1.0, 1.0078125, -1.0, 256.0]).bfloat16()
    expected = (bias.float() + 2.0**-8).bfloat16().expand(num_rows, 4)
    assert same_bits(multiply(weight, x, bias), expected.contiguous())


def test_no_weights_and_no_rows_give_empty_results() -> None:
    x = activations(2, 1024)
    assert multiply(torch.zeros(0, 1024, dtype=torch.bfloat16), x).shape == (2, 0)


def damaged(bits: Bits) -> ops.PackedWeight:
    packed = ops.pack(to_torch(bits), "layers.0.w")
    packed.payload[-2000:-1900] ^= 0x5A
    return packed


@pytest.mark.parametrize("num_rows", [1, 3])
def test_damage_ends_with_an_exception_that_names_the_tensor(num_rows: int) -> None:
    x = activations(num_rows, 2048)
    sound = ops.pack(to_torch(gaussian(4, 2048)), "layers.0.w")
    assert_within_bound(fused.multiply(sound, x), to_torch(gaussian(4, 2048)), x)
    with pytest.raises(FormatError, match=r"layers\.0\.w: tile \d+ ended with status"):
        fused.multiply(damaged(gaussian(4, 2048)), x)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 2048), r"activations torch.float32 \[1, 2048\] on cpu; expected BF16"),
        (activations(1, 1024), r"expected BF16 \[1 to 4, 2048\] on cpu"),
        (activations(5, 2048), "multiply 1 to 4 rows"),
        (activations(0, 2048), "multiply 1 to 4 rows"),
    ],
)
def test_activations_that_do_not_fit_are_refused(x: torch.Tensor, message: str) -> None:
    packed = ops.pack(to_torch(gaussian(4, 2048)), "w")
    with pytest.raises(UnsupportedError, match=message):
        fused.matmul(x, packed.desc, 4, 2048)


def test_weights_and_biases_that_do_not_fit_are_refused() -> None:
    narrow = ops.pack(to_torch(gaussian(4, 684)), "w")
    with pytest.raises(UnsupportedError, match=r"weight \[4, 684\]; .* multiples of 8 columns"):
        fused.matmul(activations(1, 684), narrow.desc, 4, 684)
    packed = ops.pack(to_torch(gaussian(4, 2048)), "w")
    with pytest.raises(
        UnsupportedError, match=r"bias torch.float16 \[4\]; expected BF16 or FP32 \[4\]"
    ):
        fused.matmul(activations(1, 2048), packed.desc, 4, 2048, torch.zeros(4).half())


def test_every_supported_number_of_columns_fits_its_segments() -> None:
    for cols in range(8, 6000, 8):
        touched = max((offset % cols + 2047) // cols + 1 for offset in range(0, cols * 2048, 2048))
        assert kernels.num_segments(cols) >= touched
        assert kernels.is_supported(cols) == (cols >= 688)


def test_activations_that_are_a_slice_reach_the_kernel_aligned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Bug caught: Triton compiles another kernel for a misaligned address, and did so while requests waited.
    weight, cols = to_torch(gaussian(2, 1024)), 1024
    packed, memory = ops.pack(weight, "w"), torch.empty(2 * cols + 1, dtype=torch.bfloat16)
    x = memory[1 : cols + 1].view(1, cols)
    x.copy_(activations(1, cols))
    assert x.data_ptr() % 16
    addresses, real = [], kernels.matmul

    def spy(x: torch.Tensor, *rest: object) -> None:
        addresses.append(x.data_ptr())
        real(x, *rest)

    monkeypatch.setattr(kernels, "matmul", spy)
    scratch = (
        torch.empty(ops.padded_numel(2, cols), dtype=torch.bfloat16),
        torch.empty(ops.num_tiles(2, cols), dtype=torch.int32),
    )
    found = fused.launch_matmul(x, packed.desc, 2, cols, None, scratch)
    assert [address % 16 for address in addresses] == [0]
    assert same_bits(found, multiply(weight, x.clone()))
