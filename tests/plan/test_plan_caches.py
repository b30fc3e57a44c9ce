"""Caches of other kinds than keys and values: refused in a sentence where they are not counted."""

import json
from pathlib import Path
from typing import Any

import cached_models
import pytest

from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.plan.config import read_model_config
from vllm_dfloat.plan.memory import kv_cache_of
from vllm_dfloat.plan.refusals import LAST_SERVED
from vllm_dfloat.plan.settings import Settings


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("caches")
    return {name: cached_models.save(name, root / name) for name in cached_models.MODELS}


def test_fp8_takes_what_vllm_packs_a_latent_vector_of_sparse_attention_into(
    folders: dict[str, Path],
) -> None:
    config = read_model_config(folders["DeepSeek V3.2"] / "config.json")
    cache = kv_cache_of(config, Settings(kv_cache_dtype="fp8"))
    assert cache.bytes_per_token(range(config.num_layers)) == 4 * (656 + 132)


def test_models_that_no_supported_vllm_serves_are_refused_with_the_last_one_that_did(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    from vllm.model_executor.models.registry import _PREVIOUSLY_SUPPORTED_MODELS

    entries = json.loads((folders["Olmo Hybrid"] / "config.json").read_text())
    for architecture, version in LAST_SERVED.items():
        assert _PREVIOUSLY_SUPPORTED_MODELS[architecture] == version
        (tmp_path / "config.json").write_text(
            json.dumps({**entries, "architectures": [architecture]})
        )
        with pytest.raises(UnsupportedError, match=f"which vLLM {version} was the last to serve"):
            read_model_config(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        (dict(model_type="deepseek_v4"), "caches compressed keys and values, which plan does not count"),
        (dict(model_type="qwen4_exp_text"), "caches states of several sizes"),
        (dict(attn_type_list=[1, 0]), "attn_type_list says that not every layer"),
        (dict(model_type="llama", linear_attn_config={"a": 1}), "linear_attn_config says that not every"),
        (dict(model_type="deepseek_v3", index_topk=8), "index_topk, sparse latent attention, of model_type"),
    ],
)  # fmt: skip
def test_other_caches_are_refused_in_a_sentence(
    entries: dict[str, Any], sentence: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    given = json.loads((folders["AXK1"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**given, **entries}))
    with pytest.raises(UnsupportedError, match=sentence):
        read_model_config(tmp_path / "config.json")
