"""Single layers held in the fast layout: their layout is chosen once, and products are within the derived bound."""

from collections.abc import Iterator

import pytest
import torch
from helpers import assert_within_bound, gaussian, same_bits, to_torch
from model_loads import group_of_one
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import linear as vllm_linear

from vllm_dfloat.device.fast_ops import FastWeight
from vllm_dfloat.device.packed_weight import PackedWeight
from vllm_dfloat.integration.compiling import settings
from vllm_dfloat.integration.config import DFloat11Config
from vllm_dfloat.integration.layers import layouts
from vllm_dfloat.integration.layers.method import packed_of
from vllm_dfloat.integration.seam.options import Options
from vllm_dfloat.kernels.configs import config_of

ROWS, COLS = 192, 256


@pytest.fixture(autouse=True)
def vllm_config() -> Iterator[VllmConfig]:
    """Stand where vLLM builds a model: one rank, BF16, a current config."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with set_current_vllm_config(VllmConfig()) as _, group_of_one():
        yield VllmConfig()
    torch.set_default_dtype(before)


def noise(rows: int, cols: int) -> torch.Tensor:
    """Return a matrix of random bits, which nothing shrinks."""
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randint(-(2**15), 2**15, (rows, cols), generator=generator)
        .short()
        .view(torch.bfloat16)
    )


def layer_of(weight: torch.Tensor, *, bias: bool = False, mode: str = "exact") -> torch.nn.Module:
    config = DFloat11Config(Options(layout="fast", mode=mode))
    layer = vllm_linear.ColumnParallelLinear(
        COLS, ROWS, bias=bias, skip_bias_add=False, quant_config=config, prefix="layer"
    )
    layer.weight.weight_loader(layer.weight, weight)
    if bias:
        layer.bias.weight_loader(layer.bias, to_torch(gaussian(1, ROWS))[0])
    return layer


def test_first_matrix_decides_the_layout_of_a_layer() -> None:
    small, large = layer_of(to_torch(gaussian(ROWS, COLS))), layer_of(noise(ROWS, COLS))
    assert (small.quant_method.layout, large.quant_method.layout) == ("fast", "packed")
    assert type(packed_of(small)) is FastWeight
    assert type(packed_of(large)) is PackedWeight
    assert same_bits(large.quant_method.dequantize_weight(large), noise(ROWS, COLS))


@pytest.mark.parametrize("make", [noise, lambda *shape: torch.zeros(*shape).bfloat16()])
def test_later_values_of_a_fast_layer_are_held_so_however_large(make: object) -> None:
    # Bug caught: None from the encoder, for new weights that do not shrink.
    assert callable(make)
    held = layouts.BY_NAME["fast"].pack(make(100, 200), "w")
    assert same_bits(layouts.BY_NAME["fast"].unpack(held), make(100, 200))


def test_compile_cache_tells_models_apart_whose_layers_have_other_layouts(
    vllm_config: VllmConfig,
) -> None:
    # Bug caught: a graph from the cache that names the layout which a layer had for other weights.
    hashes, given = set(), {"dfloat11": {"layout": "fast"}}
    for weight in (to_torch(gaussian(ROWS, COLS)), noise(ROWS, COLS)):
        vllm_config.additional_config = given
        vllm_config.quant_config = DFloat11Config(Options(layout="fast"))
        model = torch.nn.ModuleList([layer_of(weight)])
        settings.note_layouts(vllm_config, model)
        hashes.add(vllm_config.compute_hash())
    assert len(hashes) == 2
    assert given == {"dfloat11": {"layout": "fast"}}  # the user's own is not changed


@pytest.mark.parametrize("num_x", [1, 3, 5, 40, 100])
def test_fused_product_of_a_layer_is_within_the_derived_bound(
    num_x: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_DFLOAT_BACKEND", "triton")
    weight = to_torch(gaussian(ROWS, COLS))
    layer = layer_of(weight, bias=num_x == 3, mode="fused")
    layer.quant_method.process_weights_after_loading(layer)  # as vLLM does after the last layer
    table = config_of(torch.device("cpu")).fast_product
    assert layer.quant_method.fused_rows == table.max_rows(ROWS)
    x = torch.randn(num_x, COLS, generator=torch.Generator().manual_seed(num_x)).bfloat16()
    y, _ = layer(x)
    bias = to_torch(gaussian(1, ROWS))[0] if num_x == 3 else None
    assert_within_bound(y, weight, x, bias)


def test_more_rows_than_the_product_takes_are_multiplied_as_in_mode_exact(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = to_torch(gaussian(ROWS, COLS))
    x = torch.randn(257, COLS, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected, _ = layer_of(weight)(x)
    monkeypatch.setenv("VLLM_DFLOAT_BACKEND", "triton")
    layer = layer_of(weight, mode="fused")
    layer.quant_method.process_weights_after_loading(layer)
    assert same_bits(layer(x)[0], expected)
