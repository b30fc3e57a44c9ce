"""Causal models loaded for pooling: vLLM leaves their LM head out, on the meta device, and still has it processed."""

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from model_loads import loaded

from vllm_dfloat.convert.compress import compress
from vllm_dfloat.convert.source import open_source
from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.integration.layers.method import packed_of

pytestmark = pytest.mark.engine

SMALL: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=64,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
)
POOLING: dict[str, Any] = dict(
    quantization="dfloat11",
    runner="pooling",
    skip_tokenizer_init=False,
    tokenizer=str(tiny_models.SHIPPED),
    hf_overrides=dict(head_dtype="model"),  # a classifier in BF16, which is compressed too
)
DOWN_PROJ = "model.layers.1.mlp.down_proj"


def with_score(tensors: dict[str, torch.Tensor]) -> None:
    tensors["score.weight"] = torch.randn(2, SMALL["hidden_size"]).bfloat16()


@pytest.mark.parametrize("convert", ["embed", "classify"])
@pytest.mark.parametrize("is_compressed", [False, True], ids=["bf16 folder", "compressed folder"])
def test_lm_head_that_is_left_out_is_not_compressed(
    convert: str, is_compressed: bool, tmp_path: Path
) -> None:
    # Bug caught: "device meta: dfloat11 decodes on CPUs, NVIDIA and AMD GPUs only".
    model = tiny_models.save("llama", tmp_path / "m", **SMALL)
    if convert == "classify":
        tiny_models.edit(model, with_score)
    if is_compressed:
        compress(open_source(model), tmp_path / "df11")
        model = tmp_path / "df11"
    with loaded(model, convert=convert, **POOLING) as served:
        held = [name for name, layer in served.named_modules() if packed_of(layer) is not None]
        assert all(not parameter.is_meta for parameter in served.parameters())
    assert len(held) == 9 + (convert == "classify")
    assert not any("lm_head" in name for name in held)


def test_other_layer_without_weights_is_refused(tmp_path: Path) -> None:
    model = tiny_models.save("llama", tmp_path / "m", **SMALL)
    tiny_models.edit(model, lambda tensors: tensors.pop(f"{DOWN_PROJ}.weight"))
    expected = pytest.raises(UnsupportedError, match=f"{DOWN_PROJ}.weight: 0 of 4096 weights")
    with expected, loaded(model, convert="embed", **POOLING):
        pass
