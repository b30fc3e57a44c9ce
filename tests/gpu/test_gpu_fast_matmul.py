"""The product with the fast layout on a GPU: every form has the same bits, within the bound, each row for itself."""

from dataclasses import replace

import pytest
import torch
from gpu_helpers import DEVICE, NEEDS_GPU, gaussian, of_size
from helpers import assert_within_bound, same_bits, to_torch

from vllm_dfloat.device import fast_ops
from vllm_dfloat.kernels import fast_matmul as kernels
from vllm_dfloat.kernels.configs import config_of
from vllm_dfloat.kernels.fast_escapes import FORMS, PLAIN
from vllm_dfloat.kernels.fast_product import LOW_BANDS, TALL_BANDS, DotShape, GemvShape

pytestmark = NEEDS_GPU
COLS = 1024
# Each number of rows of x has its own kernel; and some that leave rows of a kernel empty.
NUM_ROWS = of_size([1, 2, 3, 4, 5, 16, 17, 33, 64], [3, 5])


def hard(rows: int) -> torch.Tensor:
    """Return a matrix with a raw tile, a row of zeros, and escapes at the edges of tiles and of the matrix."""
    weight = to_torch(gaussian(rows, COLS))
    for row, col in (
        (0, 0),
        (0, 127),
        (1, 128),
        (rows - 1, COLS - 1),
        (rows - 1, 0),
        (7, 200),
        (7, 201),
    ):
        weight[row, col] = 1e-30
    weight[2, 130:138] = 1e20
    weight[5, 512:640] = 0
    spread = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)) * 9
    weight[:64, 384:512] = (weight[:64, 384:512].float() * spread.exp()).bfloat16()
    return weight.to(DEVICE)


def multiply(
    weight: torch.Tensor, x: torch.Tensor, shape: DotShape | GemvShape, form: int
) -> torch.Tensor:
    """Return the kernels' result, computed in poisoned memory."""
    fast = fast_ops.pack(weight)
    assert fast is not None
    out = torch.full((len(x), fast.rows), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    size = kernels.num_partials(fast.rows, len(x), shape)
    partials = torch.full((size,), float("nan"), device=DEVICE)
    kernels.matmul(x, fast.desc, fast.cols, None, out, partials, shape, form)
    return out


@pytest.mark.parametrize("parts", of_size([1, 3], [1]))
@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_gpu_forms_have_the_same_bits_within_the_bound_whatever_other_rows_hold(
    num_rows: int, parts: int
) -> None:
    weight = hard(of_size([203], [131])[0])
    generator = torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, COLS, generator=generator).bfloat16().to(DEVICE)
    config = config_of(torch.device(DEVICE)).fast_product
    choice = config.choice(28_672, num_rows)
    assert_forms_agree(weight, x, replace(choice.shape if choice else DotShape(), parts=parts))


@pytest.mark.parametrize("num_rows", of_size([5, 16, 32, 50], [5]))
def test_gpu_product_that_loads_ahead_has_the_same_bits_in_every_form(num_rows: int) -> None:
    weight = hard(of_size([203], [131])[0])
    x = torch.randn(num_rows, COLS, generator=torch.Generator().manual_seed(9)).bfloat16()
    ahead = DotShape(rows=16, stages=1, warps=1, width=4)
    in_order = [
        replace(ahead, in_order=True, rows=rows, warps=warps, cols=128 * warps)
        for rows, warps in ((16, 1), (16, 2), (8, 1), (8, 2))
        if COLS % (128 * warps) == 0
    ]
    tall = [TALL_BANDS, replace(TALL_BANDS, parts=3), replace(TALL_BANDS, rows=64, warps=2)]
    low = [LOW_BANDS, replace(LOW_BANDS, parts=3)]
    shapes = [*tall, *(low if num_rows <= 16 else [])]
    shapes += [ahead, replace(ahead, parts=3), *in_order] if num_rows <= 32 else []
    for shape in of_size(shapes, [TALL_BANDS, LOW_BANDS, ahead, *in_order[::3]]):
        assert_forms_agree(weight, x.to(DEVICE), shape)


@pytest.mark.parametrize("num_rows", of_size([65, 128, 130, 256], [130]))
def test_gpu_product_of_many_rows_has_the_same_bits_in_every_form(num_rows: int) -> None:
    weight = hard(of_size([203], [131])[0])
    x = torch.randn(num_rows, COLS, generator=torch.Generator().manual_seed(9)).bfloat16()
    for shape in of_size([TALL_BANDS, replace(TALL_BANDS, parts=3)], [TALL_BANDS]):
        assert_forms_agree(weight, x.to(DEVICE), shape)


def assert_forms_agree(weight: torch.Tensor, x: torch.Tensor, shape: DotShape | GemvShape) -> None:
    expected = multiply(weight, x, shape, PLAIN)
    assert_within_bound(expected, weight, x)
    for form in of_size(list(FORMS), [PLAIN]):
        assert same_bits(multiply(weight, x, shape, form), expected)
        others = torch.full_like(x, float("inf"))
        others[-1] = x[-1]
        assert same_bits(multiply(weight, others, shape, form)[-1], expected[-1])
