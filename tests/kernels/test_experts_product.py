"""The product with experts in the fast layout, and vLLM's own for BF16 experts: the same bits, both interpreted.

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
import vllm_experts
from compiled_target import interpreted_only
from tensor_cores import interpret_with_them
from vllm_experts import BLOCKS, Sorted

from vllm_dfloat.device import fast_expert_product, fast_ops
from vllm_dfloat.device.fast_expert_product import Routed
from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.integration.layers import cancelling

EXPERTS, ROWS, COLS = 4, 48, 256
MATRICES = fast_matrices.fast_matrices() | helpers.hard_matrices()


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return vllm_experts.load(tmp_path_factory.mktemp("vllm"))


@pytest.fixture
def vllm_kernel(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    interpret_with_them(monkeypatch)
    monkeypatch.setenv("VLLM_DFLOAT_BACKEND", "triton")
    return module.fused_moe_kernel


def operands(num_x: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return activations, experts whose products cancel, with escapes and raw tiles, and biases."""
    cpu = torch.device("cpu")
    x, weight, bias = cancelling.operands(num_x, EXPERTS * ROWS, COLS, torch.bfloat16, cpu)
    assert bias is not None
    weight[:64, 128:] *= torch.exp2(torch.randn(64, 128) * 9).bfloat16()
    weight[70, 7], weight[191, 255], weight[100] = 1e-30, 1e20, 0
    return x, weight.view(EXPERTS, ROWS, COLS), bias.view(EXPERTS, ROWS)


def routed(num_x: int, top_k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each row of a result its expert and the weight of the router."""
    rng = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(EXPERTS, generator=rng)[:top_k] for _ in range(num_x)])
    return chosen.int().view(-1), torch.rand(num_x * top_k, generator=rng)


def multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    expert_of: torch.Tensor | Sorted,
    block: int,
    top_k: int = 1,
    weights: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    desc: torch.Tensor | None = None,
) -> torch.Tensor:
    num_experts, rows, cols = weight.shape
    held = fast_ops.pack_again(weight.reshape(-1, cols), "experts")
    out = torch.full((len(x) * top_k, rows), float("nan"), dtype=torch.bfloat16)
    ids = padded = None
    experts = expert_of
    if isinstance(expert_of, Sorted):
        ids, padded, experts = expert_of.ids, expert_of.num_padded, expert_of.expert_of_block
    assert torch.is_tensor(experts)
    given = Routed(ids, padded, experts, block, len(x), top_k, weights)
    desc = held.desc if desc is None else desc
    fast_expert_product.multiply(x, desc, num_experts, rows, cols, given, bias, out)
    return out


@pytest.mark.parametrize(
    ("num_x", "top_k", "block", "block_k", "kinds"),
    [
        (3, 2, 16, 128, ()),  # one part of a block
        (20, 2, 16, 128, (torch.float32, torch.bfloat16)),  # several blocks
        (18, 4, 64, 32, (torch.bfloat16, torch.float32)),  # several parts of a block
    ],
)
def test_sorted_tokens_get_the_bits_of_vllm(
    num_x: int, top_k: int, block: int, block_k: int, kinds: Any, vllm_kernel: Any
) -> None:
    x, weight, bias = operands(num_x)
    expert_of, weights = routed(num_x, top_k)
    by_expert = vllm_experts.sort(expert_of, block)
    blocks = BLOCKS | {"BLOCK_SIZE_M": block, "BLOCK_SIZE_K": block_k}
    given = (weights.to(kinds[0]), bias.to(kinds[1])) if kinds else (None, None)
    expected = vllm_experts.multiply(vllm_kernel, x, weight, by_expert, top_k, *given, blocks)
    found = multiply(x, weight, by_expert, block, top_k, *given)
    assert helpers.same_bits(found, expected)
    assert found.float().abs().max() > 0


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_few_tokens_that_are_not_sorted_get_the_bits_of_vllm(
    kind: torch.dtype, vllm_kernel: Any
) -> None:
    x, weight, bias = operands(3)
    expert_of, weights = routed(3, 2)
    expert_of = expert_of.to(kind)
    expert_of[1] = -1  # a token that is masked
    given = weights, bias
    expected = vllm_experts.multiply(vllm_kernel, x, weight, expert_of, 2, *given)
    found = multiply(x, weight, expert_of, 16, 2, *given)
    assert helpers.same_bits(found, expected)
    assert not found[1].any()


def test_tokens_of_experts_of_other_ranks_get_zeros(vllm_kernel: Any) -> None:
    x, weight, _bias = operands(20)
    expert_of, weights = routed(20, 2)
    by_expert = vllm_experts.sort(expert_of, 16)
    local = torch.tensor([1, -1, 0, -1], dtype=torch.int32)
    of_rank = Sorted(by_expert.ids, local[by_expert.expert_of_block.long()], by_expert.num_padded)
    expected = vllm_experts.multiply(vllm_kernel, x, weight, of_rank, 2, weights, None)
    found = multiply(x, weight, of_rank, 16, 2, weights)
    assert helpers.same_bits(found, expected)
    assert not found[expert_of % 2 == 1].any()


def test_rows_in_no_block_are_not_written(vllm_kernel: Any) -> None:
    x, weight, _bias = operands(20)
    expert_of, _weights = routed(20, 1)
    by_expert = vllm_experts.sort(expert_of, 16)
    by_expert.ids[by_expert.ids == 5] = 20
    found = multiply(x, weight, by_expert, 16)
    assert found[5].isnan().all()
    found[5] = 0
    assert not found.isnan().any()


@pytest.mark.parametrize(
    "name", ["all 65,536 patterns", "raw tiles", "specials and a zero row", "heavy tails"]
)
def test_hard_matrices_give_the_bits_of_vllm(name: str, vllm_kernel: Any) -> None:
    weight = helpers.to_torch(np.ascontiguousarray(MATRICES[name][:160, :128])).view(2, 80, 128)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    expert_of = torch.tensor([0, 1, 1, 0, 1], dtype=torch.int32)
    by_expert = vllm_experts.sort(expert_of, 16)
    expected = vllm_experts.multiply(vllm_kernel, x, weight, by_expert, 1, None, None)
    found = multiply(x, weight, by_expert, 16)
    # Which NaN it is the interpreter does not tell as a GPU would.
    assert torch.equal(found.isnan(), expected.isnan())
    assert helpers.same_bits(found.nan_to_num(), expected.nan_to_num())


@interpreted_only
def test_another_order_would_be_seen(
    vllm_kernel: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, _bias = operands(20)
    expert_of, _weights = routed(20, 1)
    by_expert = vllm_experts.sort(expert_of, 16)
    other = vllm_experts.load(tmp_path, as_written=True).fused_moe_kernel
    expected = vllm_experts.multiply(other, x, weight, by_expert, 1, None, None)
    found = multiply(x, weight, by_expert, 16)
    assert (found.view(torch.int16) != expected.view(torch.int16)).float().mean() > 0.3


def test_a_changed_descriptor_gives_nan(vllm_kernel: Any) -> None:
    x, weight, _bias = operands(3)
    expert_of, _weights = routed(3, 1)
    desc = fast_ops.pack_again(weight.reshape(-1, COLS), "experts").desc
    desc[1] += 1
    assert multiply(x, weight, expert_of, 16, desc=desc).isnan().all()


@pytest.mark.parametrize(
    ("none", "dtype"),
    [((EXPERTS, 2**30), torch.int32), ((2**32 + 1, 2**63 - 1), torch.int64)],
)
def test_an_expert_that_does_not_exist_gives_nan(
    none: tuple[int, int], dtype: torch.dtype, vllm_kernel: Any
) -> None:
    # Bug caught: a number cut to 32 bits before it was compared.
    x, weight, bias = operands(3)
    expert_of = torch.tensor([1, *none], dtype=dtype)
    found = multiply(x, weight, expert_of, 16, bias=bias)
    assert found[1:].isnan().all()
    assert not found[0].isnan().any()


@pytest.mark.parametrize(("rows", "cols"), [(40, 128), (48, 192)])
def test_sizes_that_the_kernel_does_not_take_are_refused(
    rows: int, cols: int, vllm_kernel: Any
) -> None:
    assert not fast_expert_product.max_tokens(torch.device("cpu"), 8, 2, rows, cols)
    x, weight = torch.zeros(2, cols).bfloat16(), torch.zeros(2, rows, cols).bfloat16()
    with pytest.raises(UnsupportedError, match="multiples of 16 rows and of 128 columns"):
        multiply(x, weight, torch.zeros(2, dtype=torch.int32), 16)


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"ids": torch.zeros(16).long()}, "ids"),
        ({"num_padded": torch.zeros(1, dtype=torch.int32, device="meta")}, "num_padded"),
        ({"expert_of_block": torch.zeros(1).short()}, "expert_of_block"),
        ({"weights": torch.zeros(2).half()}, "weights"),
        ({"weights": torch.zeros(1)}, "weights"),
    ],
)
def test_operands_that_the_kernel_does_not_take_are_refused(
    changed: dict[str, torch.Tensor], name: str, vllm_kernel: Any
) -> None:
    # Bug caught: memory of another device read as ids, and numbers of another dtype.
    x, out = torch.zeros(2, COLS).bfloat16(), torch.zeros(2, 16).bfloat16()
    desc = fast_ops.pack_again(torch.zeros(16, COLS).bfloat16(), "experts").desc
    ints = {key: torch.zeros(16, dtype=torch.int32) for key in ("ids", "num_padded")}
    given = Routed(**ints, expert_of_block=ints["ids"], block=16, num_tokens=2, top_k=1, weights=None)  # fmt: skip
    with pytest.raises(UnsupportedError, match=f"experts_product: {name}"):
        fast_expert_product.multiply(x, desc, 1, 16, COLS, replace(given, **changed), None, out)
    fast_expert_product.multiply(x, desc, 1, 16, COLS, given, None, out)


def test_the_most_tokens_follow_from_experts_and_those_of_a_token(vllm_kernel: Any) -> None:
    cpu = torch.device("cpu")
    assert fast_expert_product.max_tokens(cpu, 128, 8, ROWS, COLS) == 16 * 128 // 8
    assert fast_expert_product.variants(16, 20) == {8: 8, 16: 20}
    assert fast_expert_product.variants(4, 20) == {8: 20}
