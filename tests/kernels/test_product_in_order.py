"""The fast product in order, and vLLM's batch-invariant product: the same bits, both kernels interpreted.

Triton's interpreter multiplies as tensor_cores.py does, where other products, or another order, are seen.
"""

from dataclasses import replace
from types import ModuleType
from typing import Any

import fast_matrices
import helpers
import numpy as np
import pytest
import torch
import vllm_matmul
from compiled_target import TARGET, interpreted_only
from tensor_cores import interpret_with_them

from vllm_dfloat.device import fast_ops
from vllm_dfloat.integration.layers import cancelling
from vllm_dfloat.kernels import fast_matmul
from vllm_dfloat.kernels.fast_product import LOW_BANDS, TALL_BANDS, DotShape

# The tensor cores of warp groups take their operands in another order of columns than those of a warp.
WIDTH_OF_WARPS = 4 if TARGET else DotShape().width
WIDTH = WIDTH_OF_WARPS if TARGET and TARGET < 90 else DotShape().width
IN_ORDER = DotShape(width=WIDTH, in_order=True)
MATRICES = helpers.hard_matrices() | fast_matrices.fast_matrices()


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return vllm_matmul.load(tmp_path_factory.mktemp("vllm"))


@pytest.fixture
def vllm_kernel(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    interpret_with_them(monkeypatch)
    return module.matmul_kernel_persistent


def multiply(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, shape: DotShape
) -> torch.Tensor:
    held = fast_ops.pack_again(weight, "w")
    out = torch.full((len(x), len(weight)), float("nan"), dtype=torch.bfloat16)
    fast_matmul.matmul(x, held.desc, weight.shape[1], bias, out, out.float(), shape)
    return out


def fitted(bits: np.ndarray, rows: int = 65, cols: int = 128) -> torch.Tensor:
    """Return a part of a matrix, or its weights again and again, of a size that the kernel takes."""
    if bits.shape[0] >= rows and bits.shape[1] >= cols:  # so that raw tiles stay whole
        first = 64 if bits.shape[0] >= 64 + rows else 0
        return helpers.to_torch(np.ascontiguousarray(bits[first : first + rows, :cols]))
    return helpers.to_torch(np.resize(bits, (rows, cols)))


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    # Which NaN it is the interpreter does not tell as a GPU would.
    assert torch.equal(a.isnan(), b.isnan())
    assert helpers.same_bits(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("name", [name for name, bits in MATRICES.items() if bits.size])
def test_hard_matrices_give_the_bits_of_vllm(name: str, vllm_kernel: Any) -> None:
    weight = fitted(MATRICES[name])
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert_same(
        multiply(x, weight, None, IN_ORDER), vllm_matmul.linear(vllm_kernel, x, weight, None)
    )


@pytest.mark.parametrize("block_k", [32, 64, 128])
@pytest.mark.parametrize(
    ("shape", "num_x"),
    [
        (IN_ORDER, 17),
        (DotShape(cols=256, width=WIDTH, in_order=True), 64),
        (DotShape(rows=32, warps=2, width=WIDTH_OF_WARPS, in_order=True), 1),
        (DotShape(rows=128, warps=8, width=WIDTH, in_order=True), 5),
        (DotShape(rows=16, stages=1, warps=1, width=4, in_order=True), 17),
        (DotShape(rows=8, cols=256, stages=1, warps=2, width=4, in_order=True), 3),
        (replace(LOW_BANDS, in_order=True), 13),
        (replace(TALL_BANDS, rows=64, warps=2, in_order=True), 5),
        (replace(TALL_BANDS, in_order=True), 70),
    ],
)
def test_sums_that_cancel_give_the_bits_of_vllm(
    shape: DotShape, num_x: int, block_k: int, vllm_kernel: Any
) -> None:
    x, weight, bias = cancelling.operands(num_x, 70, 256, torch.bfloat16, torch.device("cpu"))
    blocks = vllm_matmul.BLOCKS | {"BLOCK_SIZE_K": block_k}
    expected = vllm_matmul.linear(vllm_kernel, x, weight, bias, blocks)
    assert helpers.same_bits(multiply(x, weight, bias, shape), expected)


@interpreted_only
@pytest.mark.parametrize(
    "other",
    [
        DotShape(),
        DotShape(parts=2, in_order=True),
        replace(LOW_BANDS, parts=2),
        DotShape(width=4, in_order=True),
    ],
)
def test_any_other_order_is_seen(other: DotShape, vllm_kernel: Any) -> None:
    # What the other tests compare would not be equal in another order.
    x, weight, _ = cancelling.operands(2, 64, 512, None, torch.device("cpu"))
    held = fast_ops.pack_again(weight, "w")
    out = torch.full((2, 64), float("nan"), dtype=torch.bfloat16)
    partials = torch.zeros(fast_matmul.num_partials(64, 2, other))
    fast_matmul.matmul(x, held.desc, 512, None, out, partials, other)
    expected = vllm_matmul.linear(vllm_kernel, x, weight, None)
    different = out.view(torch.int16) != expected.view(torch.int16)
    assert different.float().mean() > 0.3
