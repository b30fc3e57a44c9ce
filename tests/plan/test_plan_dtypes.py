"""Models whose config or weights are not in bfloat16, and models for which no plan can be made."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import SHIPPED

from vllm_dfloat.errors import DFloatError
from vllm_dfloat.plan.measured import to_bf16
from vllm_dfloat.plan.plan import make_plan
from vllm_dfloat.plan.settings import Settings

CONFIGS = Path(__file__).parents[1] / "data" / "configs"


def written(folder: Path, **changes: Any) -> str:
    """Write the 8B's config with changes, and return its folder; None removes an entry."""
    config = {**json.loads((CONFIGS / "Llama-3.1-8B.json").read_text()), **changes}
    kept = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return str(folder)


@pytest.mark.parametrize("entry", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    ("dtype", "note"),
    [
        ("float16", "float16: both columns are those of --dtype bfloat16"),
        ("torch.float16", "float16: both columns are those of --dtype bfloat16"),
        ("float32", "float32: both columns are those of bfloat16"),
    ],
)
def test_other_dtypes_are_planned_as_bfloat16_and_the_plan_says_so(
    entry: str, dtype: str, note: str, tmp_path: Path
) -> None:
    # Bug caught: a float16 model was planned as if nothing had to be converted.
    plan = make_plan(written(tmp_path, **{"torch_dtype": None, entry: dtype}), Settings())
    assert plan.ranks[0].bf16_weights == 2 * 8_030_261_248
    assert any(note in told for told in plan.notes)


def test_a_config_without_a_dtype_says_what_is_assumed(tmp_path: Path) -> None:
    plan = make_plan(written(tmp_path, torch_dtype=None), Settings())
    assert "config.json names no dtype: bfloat16 is assumed" in plan.notes
    assert not any("dtype" in note for note in make_plan(written(tmp_path), Settings()).notes)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", 16])
def test_a_dtype_of_no_weights_is_refused(dtype: Any, tmp_path: Path) -> None:
    with pytest.raises(DFloatError, match="plan knows bfloat16, float16, float32"):
        make_plan(written(tmp_path, torch_dtype=dtype), Settings())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_codes_of_other_dtypes_are_measured_as_what_vllm_converts_them_to(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = load_file(SHIPPED / "model.safetensors")
    for name, folder in ((dtype, tmp_path / "stored"), (torch.bfloat16, tmp_path / "rounded")):
        folder.mkdir()
        (folder / "config.json").write_bytes((SHIPPED / "config.json").read_bytes())
        values = {key: tensor.to(dtype).to(name).contiguous() for key, tensor in tensors.items()}
        save_file(values, folder / "model.safetensors")
    stored, rounded = (make_plan(str(tmp_path / n), Settings()) for n in ("stored", "rounded"))
    assert stored.ranks[0].dfloat11_weights == rounded.ranks[0].dfloat11_weights
    assert stored.ranks[0].bf16_weights == rounded.ranks[0].bf16_weights
    wanted = f"tensors are stored in {str(dtype).removeprefix('torch.')}; vLLM converts them"
    assert any(wanted in note for note in stored.notes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rounding_to_bf16_is_that_of_torch(dtype: torch.dtype) -> None:
    bits = torch.randint(0, 1 << 16, (100_000,), dtype=torch.int32)
    if dtype == torch.float16:
        values = bits.to(torch.uint16).view(torch.float16)
    else:
        values = torch.randint(-(1 << 31), (1 << 31) - 1, (100_000,)).to(torch.int32).view(dtype)
    values = values[~values.isnan()]
    expected = values.to(torch.bfloat16).view(torch.uint16).numpy()
    assert np.array_equal(to_bf16(values.numpy()), expected)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(layer_types=["linear_attention"] * 32), "layer_types has 'linear_attention'"),
        (dict(mamba_d_state=16), "mamba_d_state says that not every layer"),
        (dict(is_encoder_decoder=True), "is_encoder_decoder says that not every layer"),
        (dict(kv_lora_rank=512), "latent attention, of model_type 'llama'"),
        (dict(model_type="deepseek_v3", kv_lora_rank=512, index_topk=2048), "latent attention"),
        (dict(text_config=5), "text_config is 5; expected an object"),
        (dict(rope_scaling=dict(type="linear", factor="2")), "factor is '2'"),
        (dict(architectures=["LlavaForConditionalGeneration"]), "vision_config has model_type"),
        (dict(architectures=["Gemma3ForConditionalGeneration"]), "has no vision_config"),
    ],
)
def test_what_the_plan_does_not_know_is_refused_and_not_guessed(
    changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(DFloatError, match=sentence):
        make_plan(written(tmp_path, **changes), Settings())
