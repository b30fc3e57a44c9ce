"""Parts of a layer whose weights are fused: where these cannot be joined with the rest, the layer is named."""

import pytest
import tiny_models
from model_loads import loaded
from safetensors.torch import load_file

from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.integration.layers.method import weights_of

pytestmark = pytest.mark.engine


def test_a_part_of_a_layer_whose_other_weights_are_damaged_is_refused_by_name() -> None:
    # Bug caught: the sentence spoke of "this layer", of as many as the model has.
    name = "model.layers.1.self_attn.qkv_proj"
    with loaded(tiny_models.SHIPPED, quantization="dfloat11") as model:
        weights_of(model.get_submodule(name))["weight"].payload[100] ^= 1
        part = name.replace("qkv", "q") + ".weight"
        stored = load_file(tiny_models.SHIPPED / "model.safetensors")[part]
        with pytest.raises(
            UnsupportedError, match=f"^{name}: only a part of it .* the rest is gone"
        ):
            model.load_weights([(part, stored)])
