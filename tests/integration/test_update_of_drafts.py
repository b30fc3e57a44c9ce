"""Updates of DFlash drafts, whose load_weights computes tensors from its weights: real loaders, without an engine."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import vllm
from model_loads import loaded
from safetensors.torch import load_file

from vllm_dfloat.errors import UnsupportedError

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(
        vllm.__version__.startswith(("0.28.", "0.30.")), reason="DFlash drafts of another form"
    ),
]

DFLOAT11 = dict(quantization="dfloat11")
K_NORMS = [f"layers.{i}.self_attn.k_norm.weight" for i in range(2)]


def dflash(target: Path, path: Path) -> Path:
    """Write a DFlash draft for `target`: its blocks, and a matrix that combines the hidden states of two of them."""
    tiny_models.save("qwen3", path, seed=3)
    config = json.loads((target / "config.json").read_text())
    config |= dict(architectures=["DFlashDraftModel"])
    config |= dict(dflash_config=dict(target_layer_ids=[0, 1], mask_token_id=0))
    (path / "config.json").write_text(json.dumps(config))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            weight = tensors.pop(name)
            if "embed" not in name and "lm_head" not in name:
                tensors[name.removeprefix("model.")] = weight
        tensors["fc.weight"] = torch.full((256, 512), 0.02, dtype=torch.bfloat16)
        tensors["hidden_norm.weight"] = tensors["norm.weight"].clone()

    return tiny_models.edit(path, change)


@pytest.fixture(scope="module")
def draft(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Any, dict[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("dflash")
    target = tiny_models.save("qwen3", folder / "target")
    model = dflash(target, folder / "draft")
    drafting = dict(method="dflash", model=str(model), num_speculative_tokens=1, **DFLOAT11)
    with loaded(target, is_draft=True, speculative_config=drafting, **DFLOAT11) as found:
        yield found, load_file(model / "model.safetensors")


def derived(model: Any) -> dict[str, torch.Tensor]:
    found = {n: v for n, v in vars(model.model).items() if isinstance(v, torch.Tensor)}
    assert {"_k_norm_weights", "_hidden_norm_weight", "_rope_cos_sin_cache"} <= found.keys()
    return found


def clones(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in derived(model).items()}


@pytest.mark.parametrize("given", ["all", "two norms", "a matrix"])
def test_tensors_that_a_draft_computes_from_its_weights_follow_them(
    given: str, draft: tuple[Any, dict[str, torch.Tensor]]
) -> None:
    # Bug caught: they were computed from weights on the meta device; the next request ended the engine.
    model, stored = draft
    before = clones(model)
    names = {
        "all": list(stored),
        "two norms": K_NORMS,
        "a matrix": ["layers.0.mlp.down_proj.weight"],
    }
    new = {name: stored[name] * 2 for name in names[given]}
    model.load_weights(iter(new.items()))
    after = derived(model)
    assert not any(tensor.is_meta for tensor in after.values())
    k_norms = [new.get(name, before["_k_norm_weights"][i]) for i, name in enumerate(K_NORMS)]
    assert torch.equal(after["_k_norm_weights"], torch.stack(k_norms))
    hidden = new.get("hidden_norm.weight", before["_hidden_norm_weight"])
    assert torch.equal(after["_hidden_norm_weight"], hidden)
    assert torch.equal(after["_rope_cos_sin_cache"], before["_rope_cos_sin_cache"])


def test_refused_update_leaves_the_tensors_that_a_draft_computes(
    draft: tuple[Any, dict[str, torch.Tensor]],
) -> None:
    model, stored = draft
    before = clones(model)
    norm, matrix = "hidden_norm.weight", "layers.0.mlp.down_proj.weight"

    def failing() -> Iterator[tuple[str, torch.Tensor]]:
        yield norm, stored[norm] * 3
        yield matrix, stored[matrix][:9].clone()

    with pytest.raises(UnsupportedError, match="as before"):
        model.load_weights(failing())
    after = derived(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
