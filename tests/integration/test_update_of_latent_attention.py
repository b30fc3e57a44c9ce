"""An update of latent attention on a CPU: what it computes from kv_b_proj is renewed; with AMX it is refused."""

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from model_loads import loaded
from safetensors.torch import load_file

from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.integration.updating.update import updates_of

pytestmark = pytest.mark.engine

HAS_AMX = torch.cpu._is_amx_tile_supported()
ABSORBED = "W_UV", "W_UK_T"  # what attention multiplies by in place of kv_b_proj, computed from it


@pytest.mark.skipif(not HAS_AMX, reason="only on a CPU with AMX vLLM frees kv_b_proj")
def test_update_that_latent_attention_on_a_cpu_cannot_take_ends_in_a_sentence(
    tmp_path: Path,
) -> None:
    # Bug caught: undoing it failed too, with "shape '[512, 4, 256]' is invalid for input of size 0".
    path = tiny_models.save("deepseek_v2", tmp_path / "m")
    stored = load_file(path / "model.safetensors")
    with loaded(path, quantization="dfloat11") as model:
        assert not model.get_submodule("model.layers.0.self_attn.kv_b_proj").weight.numel()
        with pytest.raises(
            UnsupportedError, match=r"kv_b_proj\.weight .*All weights are as before"
        ):
            model.load_weights(stored.items())
        norm = {"model.norm.weight": stored["model.norm.weight"]}
        with pytest.raises(
            UnsupportedError, match=r"could not be finished.*All weights are as before"
        ):
            model.load_weights(norm.items())


@pytest.mark.skipif(HAS_AMX, reason="on a CPU with AMX vLLM frees kv_b_proj")
def test_update_of_kv_b_proj_alone_renews_what_latent_attention_computes_from_it(
    tmp_path: Path,
) -> None:
    first, second = (
        tiny_models.save("deepseek_v2", tmp_path / str(seed), seed=seed) for seed in (1, 2)
    )
    with loaded(second) as model:
        expected = absorbed(model)
    given = load_file(second / "model.safetensors")
    given = {name: tensor for name, tensor in given.items() if "kv_b_proj" in name}
    with loaded(first, quantization="dfloat11") as model:
        before = absorbed(model)
        assert len(before) == len(ABSORBED) * len(given)
        assert not any(torch.equal(before[name], expected[name]) for name in before)
        with pytest.raises(InterruptedError):
            update_and_fail(model, given)
        assert_same(absorbed(model), before)
        model.load_weights(given.items())
        assert_same(absorbed(model), expected)


def update_and_fail(model: Any, given: dict[str, torch.Tensor]) -> None:
    """Give new weights to the model, which takes them, and fail after that, as where another rank fails."""
    updates = updates_of(model)
    assert updates is not None
    with updates.undone_on_error():
        model.load_weights(given.items())
        raise InterruptedError


def absorbed(model: Any) -> dict[str, torch.Tensor]:
    """Return copies of the absorbed weights of all layers, by name."""
    return {
        f"{path}.{name}": getattr(layer, name).detach().clone()
        for path, layer in model.named_modules()
        for name in ABSORBED
        if hasattr(layer, name)
    }


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
