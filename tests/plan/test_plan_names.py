"""Sizes that older families name in their own way, and models that cache no keys and values."""

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.plan.architectures import known_weights
from vllm_dfloat.plan.config import ModelConfig, read_model_config


def read(folder: Path, **entries: Any) -> ModelConfig:
    file = folder / "config.json"
    file.write_text(json.dumps({"architectures": ["XForCausalLM"], "vocab_size": 256, **entries}))
    return read_model_config(file)


@pytest.mark.parametrize(
    ("entries", "kv_heads", "context"),
    [
        (dict(model_type="gpt2", n_layer=3, n_embd=64, n_head=4, n_positions=128), 4, 128),
        (dict(model_type="bloom", n_layer=3, hidden_size=64, n_head=4), 4, 2048),
        (dict(model_type="gpt_bigcode", n_layer=3, n_embd=64, n_head=4, n_positions=128, multi_query=True), 1, 128),
        (
            dict(
                model_type="falcon", num_hidden_layers=3, hidden_size=64, num_attention_heads=4, num_kv_heads=4,
                multi_query=True, new_decoder_architecture=False, max_position_embeddings=128,
            ),
            1,
            128,
        ),
        (
            dict(
                model_type="falcon", num_hidden_layers=3, hidden_size=64, num_attention_heads=4, num_kv_heads=2,
                multi_query=True, new_decoder_architecture=True, max_position_embeddings=128,
            ),
            2,
            128,
        ),
    ],
)  # fmt: skip
def test_sizes_have_the_names_of_their_family(
    entries: dict[str, Any], kv_heads: int, context: int, tmp_path: Path
) -> None:
    # Bug caught: BLOOM and GPT-2 had "num_hidden_layers is None"; Falcon-7B was planned with 71 KV heads, not one.
    config = read(tmp_path, **entries)
    assert (config.num_layers, config.hidden, config.heads) == (3, 64, 4)
    assert (config.kv_heads, config.context) == (kv_heads, context)


def test_a_state_space_model_is_not_planned_as_if_it_had_attention(tmp_path: Path) -> None:
    sizes = dict(num_hidden_layers=3, hidden_size=64, num_attention_heads=4)
    with pytest.raises(UnsupportedError, match="state_size says that not every layer has a cache"):
        read(tmp_path, model_type="mamba9", state_size=16, max_position_embeddings=128, **sizes)


def test_an_entry_that_a_mixture_does_not_read_makes_none_of_its_blocks_dense(
    tmp_path: Path,
) -> None:
    # Bug caught: Mixtral with first_k_dense_replace in its config was planned with a dense first block.
    (tmp_path / "config.json").write_text(
        json.dumps(
            dict(
                architectures=["MixtralForCausalLM"], model_type="mixtral", num_hidden_layers=2, hidden_size=64,
                num_attention_heads=4, vocab_size=256, intermediate_size=128, num_local_experts=4,
                max_position_embeddings=128, first_k_dense_replace=1,
            )
        )
    )  # fmt: skip
    names = {weight.name for weight in known_weights(read_model_config(tmp_path / "config.json"))}
    assert "model.layers.0.block_sparse_moe.experts.w13_weight" in names
