"""When experts are multiplied without decoding, and how vLLM's own product is found and replaced; nothing multiplies.

The products themselves: test_triton_experts.py.
"""

import gc
import weakref
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import expert_layers
import pytest
import torch
from model_loads import loaded
from vllm.model_executor.layers.fused_moe import fused_moe
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

from vllm_dfloat.device.fast_expert_product import Routed
from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.integration.layers import (
    experts_apply,
    experts_product,
    experts_proof,
    proof_cache,
    proven_experts,
)
from vllm_dfloat.integration.layers.experts_kernel import HeldExperts, Tensor3
from vllm_dfloat.integration.layers.experts_product import RoutedProduct, frozen, is_plain
from vllm_dfloat.integration.seam import expert_products

CONFIG = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 1}
PRODUCT = RoutedProduct(
    torch.device("cpu"), 64, 128, "fast", "fused-exact", 2, 2, False, None, True, frozen(CONFIG)
)


@pytest.fixture(autouse=True)
def in_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(proof_cache, "folder", lambda: tmp_path)
    monkeypatch.setattr(experts_product, "known", {})


def invoke_fused_moe_triton_kernel(x: Any) -> str:
    return f"vLLM's {x}"


class Calling:
    """As TritonExperts, calls in a function within its own; the function takes other arguments than vLLM's."""

    def apply(self, x: Any, *, twice: bool = False) -> list[str]:
        def call() -> str:
            return invoke_fused_moe_triton_kernel(x)

        return [call()] * (1 + twice)


class Other:
    def apply(self, x: Any) -> Any:
        return x


def test_vllms_product_is_found_where_it_is_called_with_the_arguments_that_are_known() -> None:
    assert expert_products.product_of(TritonExperts) is fused_moe.invoke_fused_moe_triton_kernel
    assert expert_products.product_of(Calling) is None
    assert expert_products.product_of(Other) is None


def test_a_copy_of_apply_calls_another_product_and_leaves_vllms_class_alone() -> None:
    copy = expert_products.apply_with(Calling, lambda x: f"our {x}")
    assert copy(Calling(), 7, twice=True) == ["our 7", "our 7"]
    assert Calling().apply(7) == ["vLLM's 7"]


def test_weights_that_are_not_those_of_the_layer_are_refused() -> None:
    # Bug caught: a view of the scratch that nobody decoded, taken for BF16 weights.
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError

    choose: Callable[..., None] = experts_apply._choosing(never)
    x = torch.zeros(1, 128)
    with pytest.raises(UnsupportedError, match="its weights are another tensor"):
        choose(x, x, x, None, None, None, None, x, x, False, 1, CONFIG)


def test_no_call_outlives_its_kernel() -> None:
    # Bug caught: scratch and ids of every layer and step that Python's collector alone let go of.
    seen: list[weakref.ref[Any]] = []

    def apply(_kernel: Any, *, w1: torch.Tensor, w2: torch.Tensor, **_: Any) -> None:
        for tensor in (w1, w2):
            part = getattr(tensor, experts_apply._PART)
            part.is_used = True
            seen.extend(map(weakref.ref, (tensor, part, part._room)))

    desc = torch.zeros(4, dtype=torch.int64)
    w13, w2 = Tensor3(desc, (4, 32, 128)), Tensor3(desc, (4, 16, 128))
    held = HeldExperts(w13, w2, "fast", False, lambda: None, "fused", (4, 4))
    gc.disable()
    try:
        ids = torch.zeros(1, 2, dtype=torch.int32)
        experts_apply._multiply(apply, None, held, {"topk_ids": ids, "expert_map": None})
        assert len(seen) == 6
        assert [reference() for reference in seen] == [None] * 6
    finally:
        gc.enable()


@pytest.mark.parametrize("has_map", [False, True])
def test_tokens_are_sorted_as_vllm_sorts_them(
    has_map: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_moe, "moe_align_block_size", lambda *_, **__: ("sorted", None, None))
    expert_map = torch.arange(8) if has_map else None
    for num_experts, top_k in ((8, 2), (64, 8), (4, 1)):
        for tokens in range(1, 12):
            ids = torch.zeros(tokens, top_k, dtype=torch.int32)
            given = fused_moe._prepare_expert_assignment(
                ids, CONFIG, tokens, top_k, num_experts, expert_map
            )
            expected = given[0] is not None
            assert expert_products.is_sorted(tokens, top_k, num_experts, has_map) == expected


def test_launch_parameters_are_those_that_vllm_takes_for_the_number_of_tokens() -> None:
    experts = SimpleNamespace(
        quant_config=SimpleNamespace(config_name=lambda dtype: None), block_shape=None
    )
    w13, w2 = (8, 256, 128), (8, 128, 128)
    found = [expert_products.config_for(experts, w13, w2, 2, tokens) for tokens in (1, 33, 200)]
    assert [config["BLOCK_SIZE_M"] for config in found] == [16, 32, 64]


def test_a_proof_holds_for_all_that_the_order_depends_on_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared: list[Any] = []

    def compare(product: RoutedProduct, counts: Collection[int]) -> dict[int, bool]:
        compared.append(list(counts))
        return dict.fromkeys(counts, True)

    monkeypatch.setattr(experts_proof, "compare", compare)
    assert proven_experts._proven(PRODUCT, {1, 2}) == {1, 2}
    assert proven_experts._proven(PRODUCT, {2, 3}) == {2, 3}
    assert compared == [[1, 2], [3]]
    others = [
        replace(PRODUCT, config=frozen(CONFIG | {"BLOCK_SIZE_K": 64})),
        replace(PRODUCT, rows=80),
        replace(PRODUCT, cols=256),
        replace(PRODUCT, per_token=4),
        replace(PRODUCT, top_k=1),
        replace(PRODUCT, weighs=True),
        replace(PRODUCT, bias=torch.bfloat16),
        replace(PRODUCT, is_sorted=False),
    ]
    for other in others:
        compared.clear()
        assert proven_experts._proven(other, {1}) == {1}
        assert compared == [[1]], other
    monkeypatch.setenv("VLLM_TRITON_USE_TD", "1")
    compared.clear()
    proven_experts._proven(PRODUCT, {1})
    assert compared == [[1]]


def test_the_line_gives_the_numbers_of_tokens_at_which_all_products_of_a_shape_are_equal() -> None:
    w2 = replace(PRODUCT, top_k=1, rows=128)
    alone = replace(PRODUCT, is_sorted=False)
    counts = {PRODUCT: {2, 3}, alone: {1}, w2: {1, 2, 3}}
    experts_product.known |= {
        PRODUCT: frozenset({2, 3}),
        alone: frozenset(),
        w2: frozenset(),
    }
    line = proven_experts._line(counts)
    assert "for 1 of 2 shapes" in line
    assert "[64, 128] at 2 of 3 numbers of tokens; all else is decoded first" in line
    experts_product.known[PRODUCT] = frozenset()
    assert "for none of 2 shapes" in proven_experts._line(counts)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("layout", "why"),
    [
        ("fast", "vLLM's kernel CPU reads BF16"),
        ("packed", "the layout packed has no other way"),
    ],
)
def test_a_line_says_why_experts_are_decoded(
    layout: str, why: str, tmp_path: Path, log_lines: list[str]
) -> None:
    options = {"dfloat11": {"layout": layout, "mode": "fused"}}
    path = expert_layers.save("whole tiles", tmp_path)
    with loaded(path, quantization="dfloat11", additional_config=options) as model:
        method = expert_layers.experts_of(model).quant_method
        assert method.why_decoded == why
        assert method.most_tokens == (0, 0)
    assert f"dfloat11: experts are decoded first in mode 'fused' too ({why})" in log_lines


@pytest.mark.engine
@pytest.mark.parametrize(
    ("layout", "why"),
    [
        ("fast", "there is no product for experts [128, 64] and [64, 64] on cpu"),
        ("packed", "the layout packed has no other way"),
    ],
)
def test_a_line_says_so_once_too_where_it_is_known_after_loading(
    layout: str, why: str, tmp_path: Path, log_lines: list[str]
) -> None:
    # Bug caught: nothing was said of sizes that no kernel takes, nor of a layer that is packed after all.
    options = {"dfloat11": {"layout": layout, "mode": "fused"}}
    path = expert_layers.save("whole tiles", tmp_path)
    with loaded(path, quantization="dfloat11", additional_config=options) as model:
        method = expert_layers.experts_of(model).quant_method
        method.why_decoded = ""  # as with vLLM's kernel for GPUs, in the layout of the options
        log_lines.clear()
        for _ in range(2):
            proven_experts.prepare(model)
        assert method.most_tokens == (0, 0)
    assert log_lines == [f"dfloat11: experts are decoded first in mode 'fused' too ({why})"]


def test_operands_that_a_proof_did_not_see_are_decoded() -> None:
    # Bug caught: another kernel compiled in a capture, for ids of int64 (VLLM_MOE_ROUTING_SIMULATION_STRATEGY).
    x, out = torch.zeros(2, 128).bfloat16(), torch.zeros(2, 2, 64).bfloat16()
    alone = Routed(None, None, torch.zeros(4, dtype=torch.int32), 16, 2, 2, torch.zeros(4))
    assert is_plain(x, None, alone, out)
    assert is_plain(x, torch.zeros(8, 64), replace(alone, weights=None), out)
    assert not is_plain(x.float(), None, alone, out)
    assert not is_plain(x, torch.zeros(64, 4).T, alone, out)
    assert not is_plain(torch.zeros(128, 2).bfloat16().T, None, alone, out)
    for dtype in (torch.half, torch.bfloat16):
        assert not is_plain(x, None, replace(alone, weights=torch.zeros(4, dtype=dtype)), out)
    assert not is_plain(x, None, replace(alone, expert_of_block=torch.zeros(4).long()), out)
    shifted = torch.zeros(257).bfloat16()[1:]
    assert not is_plain(shifted.view(2, 128), None, alone, out)
    assert not is_plain(x, None, alone, shifted.view(2, 2, 64))
    assert not is_plain(x, None, replace(alone, weights=torch.zeros(5)[1:]), out)
    assert not is_plain(x, torch.zeros(513)[1:].view(8, 64), alone, out)


def test_no_memory_for_a_comparison_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(experts_proof.cancelling, "operands", full)
    assert proven_experts._proven(PRODUCT, {1}) == frozenset()


@pytest.mark.parametrize("tokens", [1, 2, 9, 40])
def test_the_operands_of_a_proof_give_each_row_its_expert(tokens: int) -> None:
    product = replace(PRODUCT, weighs=True)
    x = torch.zeros(tokens, 128).bfloat16()
    given = experts_proof.operands(product, tokens, x)
    ids, experts = given.routed.ids, given.routed.expert_of_block
    assert ids is not None
    assert given.routed.num_padded is not None
    assert given.routed.num_padded.item() == len(ids) == 16 * len(experts)
    flat = ids.view(-1, 16)
    found = {row: experts[at].item() for at in range(len(flat)) for row in flat[at].tolist()}
    found.pop(2 * tokens, None)  # none
    assert found == {row: min(row, 3) for row in range(2 * tokens)}
    alone = experts_proof.operands(replace(product, is_sorted=False), tokens, x)
    assert alone.routed.ids is None
    assert alone.routed.expert_of_block.tolist() == [found[row] for row in range(2 * tokens)]
