"""States of state-space, convolution and linear-attention layers are counted as vLLM holds them."""

import importlib
import json
import math
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import architectures
import plan_engines
import pytest
import transformers
from engines import SETTINGS

from vllm_dfloat.errors import DFloatError, UnsupportedError
from vllm_dfloat.plan.caches import Keys, pages_of_rank
from vllm_dfloat.plan.config import ModelConfig, read_model_config
from vllm_dfloat.plan.kv_cache import KVCache, Pages, Reach, group_layers
from vllm_dfloat.plan.plan import make_plan
from vllm_dfloat.plan.settings import Settings
from vllm_dfloat.plan.states import State

FAMILIES = {  # a config class of Transformers: the module and class of vLLM
    "FalconH1Config": ("falcon_h1", "FalconH1ForCausalLM"),
    "FalconMambaConfig": ("mamba", "MambaForCausalLM"),
    "GraniteMoeHybridConfig": ("granitemoehybrid", "GraniteMoeHybridForCausalLM"),
    "JambaConfig": ("jamba", "JambaForCausalLM"),
    "Lfm2Config": ("lfm2", "Lfm2ForCausalLM"),
    "Lfm2MoeConfig": ("lfm2_moe", "Lfm2MoeForCausalLM"),
    "MambaConfig": ("mamba", "MambaForCausalLM"),
    "Mamba2Config": ("mamba2", "Mamba2ForCausalLM"),
    "NemotronHConfig": ("nemotron_h", "NemotronHForCausalLM"),
    "Qwen3NextConfig": ("qwen3_next", "Qwen3NextForCausalLM"),
    "Qwen3_5TextConfig": ("qwen3_next", "Qwen3NextForCausalLM"),  # its own module needs torchvision
    "Zamba2Config": ("zamba2", "Zamba2ForCausalLM"),
}
CHANGES = dict(
    GraniteMoeHybridConfig=dict(layer_types=["mamba", "attention"] * 16),
    Lfm2Config=dict(layer_types=["conv", "full_attention"] * 16, conv_dim=2560),
)
VALUES: list[Any] = [0, -1, 1, 1.5, 10**30, "x", "auto", True, None, [], {}, [1, 2], ["x"], [None]]


def config_of(family: str, file: Path) -> tuple[Any, ModelConfig]:
    """Return a config with the defaults of a family, which are those of a published model, and what plan reads."""
    config = getattr(transformers, family)(**CHANGES.get(family, {}))
    entries = {**config.to_dict(), "architectures": [FAMILIES[family][1]], "dtype": "bfloat16"}
    file.write_text(json.dumps(entries))
    return config, read_model_config(file)


def of_vllm(family: str, config: Any, tp: int) -> int:
    """Return the bytes of a state, from vLLM's own shapes and dtypes."""
    from vllm.utils.torch_utils import get_dtype_size

    module, name = FAMILIES[family]
    model = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), name)
    dtype = "auto"
    if family == "NemotronHConfig":  # what its VerifyAndUpdateConfig sets
        dtype = config.mamba_ssm_cache_dtype
    if family == "Qwen3_5TextConfig":
        dtype = getattr(config, "mamba_ssm_dtype", None) or "auto"
    whole = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=config, hf_text_config=config, dtype="bfloat16"),
        cache_config=SimpleNamespace(
            mamba_cache_dtype="auto", mamba_ssm_cache_dtype=dtype, use_replayssm=False
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=tp),
        speculative_config=None,
        num_speculative_tokens=0,
    )
    shapes = model.get_mamba_state_shape_from_config(whole)
    dtypes = model.get_mamba_state_dtype_from_config(whole)
    return sum(
        math.prod(shape) * get_dtype_size(of) for shape, of in zip(shapes, dtypes, strict=True)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_state_has_the_bytes_of_vllms(family: str, tmp_path: Path) -> None:
    config, read = config_of(family, tmp_path / "config.json")
    states = {one.kind for one in read.caches if isinstance(one.kind, State)}
    (state,) = states
    for tp in (1, 2, 4, 8):
        if family == "Zamba2Config" and tp > 1:
            continue
        assert state.num_bytes(tp, "auto") == of_vllm(family, config, tp), tp


@pytest.mark.engine
def test_a_plan_has_the_blocks_and_tokens_of_an_engine_that_caches_prefixes(tmp_path: Path) -> None:
    """Each request then holds two states, and here a block of keys and values has to grow to hold one of them."""
    model = architectures.save_case("Qwen3NextForCausalLM", tmp_path / "m")
    found = plan_engines.reported(model, 1 << 26, enable_prefix_caching=True)
    settings = Settings(
        gpu_memory=1 << 26, gpu_memory_utilization=1, max_model_len=SETTINGS["max_model_len"], block_size=128,
        max_num_batched_tokens=plan_engines.BATCHED_TOKENS, overhead=0, mamba_ssm_cache_dtype=found["state_dtype"],
    )  # fmt: skip
    plan = make_plan(str(model), settings)
    assert plan.bf16.tokens == pytest.approx(found["tokens_of_room"], rel=0.01)
    assert [len(group.pages) for group in plan.kv_cache.groups] == [1, 1]
    assert plan.kv_cache.groups[1].pages[0].block_size == 256
    assert any("layers with a state: 1; of these a request" in note for note in plan.notes)


def test_pages_are_made_equal_by_longer_blocks_or_by_padding() -> None:
    kinds = [Pages(0, 100, 16), Pages(1, 200, 16, Reach(64)), Pages(2, 150, 16, Reach(32))]
    groups = group_layers(kinds)
    assert [(g.pages[0].page_bytes, g.pages[0].block_size) for g in groups] == [
        (200, 32),
        (200, 16),
        (200, 16),
    ]
    assert KVCache(groups, 8).blocks_per_request(64) == 2 + (-(-64 // 16) + 1) + (-(-39 // 16) + 1)


def test_layers_that_need_the_same_blocks_share_a_group_whatever_their_pages() -> None:
    (group,) = group_layers([Pages(0, 100, 16), Pages(1, 300, 16)])
    assert KVCache((group,), 8).block_bytes(range(2)) == 400
    assert KVCache((group,), 8).bytes_per_token(range(2)) == 25


def test_layers_that_share_keys_and_values_cache_none(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    config = transformers.Gemma3nTextConfig(num_hidden_layers=10, num_kv_shared_layers=4)
    file.write_text(json.dumps({**config.to_dict(), "architectures": ["Gemma3nForCausalLM"]}))
    assert [one.layer for one in read_model_config(file).caches] == list(range(6))


@pytest.mark.parametrize("is_new", [False, True])
def test_gemma_4_has_other_heads_where_attention_sees_everything(
    is_new: bool, tmp_path: Path
) -> None:
    """Its config says so per layer, or in its older form in two entries."""
    file = tmp_path / "config.json"
    config = transformers.Gemma4TextConfig(
        num_hidden_layers=6, num_key_value_heads=8, num_global_key_value_heads=2, attention_k_eq_v=True, head_dim=256,
        global_head_dim=512, num_kv_shared_layers=0,
    )  # fmt: skip
    entries = {**config.to_dict(), "architectures": ["Gemma4ForCausalLM"]}
    if not is_new:
        del entries["per_layer_config"]
        entries |= dict(global_head_dim=512, num_global_key_value_heads=2)
    file.write_text(json.dumps(entries))
    kinds = [one.kind for one in read_model_config(file).caches]
    assert [(kind.kv_heads, kind.head_dim) for kind in kinds if isinstance(kind, Keys)] == [
        (8, 256)
    ] * 5 + [(2, 512)]


@pytest.mark.parametrize(
    "family", [f"{name}Config" for name in ("FalconH1", "NemotronH", "Jamba", "Lfm2")]
)
def test_any_value_of_any_entry_is_read_or_a_sentence(family: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    config_of(family, file)
    original = json.loads(file.read_text())
    names = [*original, "full_attn_idxs", "layer_types", "layers_block_type", "hybrid_override_pattern"]  # fmt: skip
    for name in dict.fromkeys(names):
        for value in VALUES:
            file.write_text(json.dumps({**original, name: value}))
            with suppress(DFloatError):
                config = read_model_config(file)
                pages = pages_of_rank(config.caches, 2, 16, "auto", "auto", True)
                assert KVCache(group_layers(pages), 2048).block_bytes(range(config.num_layers)) > 0


def test_ranks_that_cannot_share_a_state_are_a_sentence() -> None:
    with pytest.raises(UnsupportedError, match="--tp 3: a layer's state has 8 channels"):
        State(8, 3, numbers=64).num_bytes(3, "auto")
    with pytest.raises(UnsupportedError, match="--mamba-ssm-cache-dtype int8: plan knows auto"):
        State(8, 3).num_bytes(1, "int8")
