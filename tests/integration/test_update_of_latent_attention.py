"""An update of latent attention on a CPU with AMX, where vLLM frees the weight that it would need: a sentence."""

from pathlib import Path
from typing import Any

import pytest
import tiny_models
from model_loads import loaded
from safetensors.torch import load_file

from vllm_dfloat.errors import UnsupportedError

pytestmark = pytest.mark.engine


def test_update_that_latent_attention_on_a_cpu_cannot_take_ends_in_a_sentence(
    tmp_path: Path,
) -> None:
    # Bug caught: undoing it failed too, with "shape '[512, 4, 256]' is invalid for input of size 0".
    path = tiny_models.save("deepseek_v2", tmp_path / "m")
    stored = load_file(path / "model.safetensors")
    with loaded(path, quantization="dfloat11") as model:
        attention: Any = model.get_submodule("model.layers.0.self_attn")
        if attention.kv_b_proj.weight.numel():
            pytest.skip("only on a CPU with AMX vLLM frees this weight")
        with pytest.raises(
            UnsupportedError, match=r"kv_b_proj\.weight .*All weights are as before"
        ):
            model.load_weights(stored.items())
        norm = {"model.norm.weight": stored["model.norm.weight"]}
        with pytest.raises(
            UnsupportedError, match=r"could not be finished.*All weights are as before"
        ):
            model.load_weights(norm.items())
