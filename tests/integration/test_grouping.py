"""Layers of a transformer block that are decoded together: one launch for each layout, and the bits of each alone."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from helpers import gaussian, same_bits, to_torch
from model_loads import group_of_one
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import linear as vllm_linear

from vllm_dfloat.device.scratch import scratch
from vllm_dfloat.integration.config import DFloat11Config
from vllm_dfloat.integration.layers import layouts
from vllm_dfloat.integration.layers.grouping import group_layers
from vllm_dfloat.integration.layers.method import packed_of
from vllm_dfloat.integration.seam.options import Options

SHAPES = [(192, 256), (64, 256), (130, 256), (200, 256)]
MIXED = ("packed", "fast", "fast", "packed")


@pytest.fixture(autouse=True)
def vllm_config() -> Iterator[None]:
    """Stand where vLLM builds a model: one rank, BF16, a current config; no scratch of other tests."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    scratch.release()
    with set_current_vllm_config(VllmConfig()), group_of_one():
        yield
    torch.set_default_dtype(before)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the layouts of the groups that were decoded since, one for each launch."""
    seen: list[str] = []
    by_name = cast(dict[str, layouts.Layout], layouts.BY_NAME)
    for name, held in list(by_name.items()):
        if groups := held.groups:

            def watched(*arguments: Any, name: str = name, launch: Any = groups.launch) -> None:
                seen.append(name)
                launch(*arguments)

            monkeypatch.setitem(
                by_name, name, replace(held, groups=replace(groups, launch=watched))
            )
    return seen


def weights(seed: int = 0) -> list[torch.Tensor]:
    return [to_torch(gaussian(*shape, seed=seed + i)) for i, shape in enumerate(SHAPES)]


def block_of(held: Sequence[str], **options: Any) -> torch.nn.Module:
    """Return a model of one block, with layers in these layouts."""
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Module()])
    for i, (layout, weight) in enumerate(zip(held, weights(), strict=True)):
        given = {} if layout == "dfloat11" else options
        config = DFloat11Config(Options(layout=layout, **given))
        layer = vllm_linear.ReplicatedLinear(
            weight.shape[1], weight.shape[0], bias=False, quant_config=config, prefix=f"layers.0.{i}"
        )  # fmt: skip
        layer.weight.weight_loader(layer.weight, weight)
        model.layers[0].register_module(f"linear{i}", layer)
    group_layers(model)
    for layer in model.layers[0].children():
        layer.quant_method.process_weights_after_loading(layer)  # as vLLM does after the last layer
    return model


def one_pass(model: torch.nn.Module, num_x: int = 3) -> list[torch.Tensor]:
    x = torch.randn(num_x, 256, generator=torch.Generator().manual_seed(num_x)).bfloat16()
    return [layer(x)[0] for layer in model.layers[0].children()]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert same_bits(one, other), i


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        (("fast",) * 4, ["fast"]),
        (MIXED, ["packed", "fast"]),
        (("fast", "packed", "packed", "packed"), ["fast", "packed"]),
        (("fast", "dfloat11", "fast", "fast"), ["fast", "fast"]),  # decoded alone, into the scratch
    ],
)
def test_a_block_takes_a_launch_for_each_layout_in_every_pass(
    held: tuple[str, ...], expected: list[str], launches: list[str]
) -> None:
    alone = one_pass(block_of(held))
    assert launches == []
    model = block_of(held, granularity="block")
    for _ in range(2):
        launches.clear()
        assert_same(one_pass(model), alone)
        assert launches == expected


@pytest.mark.parametrize("held", [("fast",) * 4, MIXED])
def test_new_weights_are_seen_by_the_next_pass(held: tuple[str, ...]) -> None:
    # Bug caught: tables that name payloads; a buffer that keeps what it held.
    model = block_of(held, granularity="block")
    one_pass(model)
    for layer, weight in zip(model.layers[0].children(), weights(seed=7), strict=True):
        packed = packed_of(layer)
        assert packed is not None
        again = layouts.BY_NAME[layer.quant_method.layout].pack(weight, "w")
        layer.__dict__["dfloat11"] = {"weight": again.described_in(packed.desc)}
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(3)).bfloat16()
    expected = [layer.quant_method.dequantize_weight(layer) for layer in model.layers[0].children()]
    for weight, new in zip(expected, weights(seed=7), strict=True):
        assert same_bits(weight, new)
    found = one_pass(model)
    for y, weight in zip(found, expected, strict=True):
        torch.testing.assert_close(y, torch.nn.functional.linear(x, weight))


def test_products_without_decoding_do_not_let_a_block_keep_old_weights(
    launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Bug caught: a CUDA graph captured without a decode, where the pass before it multiplied its first layers so.
    monkeypatch.setenv("VLLM_DFLOAT_BACKEND", "triton")
    model = block_of(("fast",) * 4, granularity="block", mode="fused")
    first = next(iter(model.layers[0].children()))
    many = min(80, first.quant_method.fused_rows)
    assert many >= 64
    others = list(model.layers[0].children())[1:]
    for layer in others:
        layer.quant_method.fused_rows = 0
    one_pass(model, 3)
    launches.clear()
    one_pass(model, many)
    assert launches == ["fast"]
    launches.clear()
    one_pass(model, 3)
    assert launches == ["fast"]
