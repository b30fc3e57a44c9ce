"""Embeddings and LM heads about which vLLM's models do not ask, in models that do more with them than look up."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sharing_models
import torch
import transformers
import unasked_models
from engines import answers, bf16_answers
from model_loads import loaded
from sharing_models import (
    of_class,
    reading,
    shares,
    shares_and_has_a_bias,
    shares_memory,
    shares_with_a_linear,
    with_a_head,
)
from tiny_models import SHIPPED

from vllm_dfloat.integration.layers.method import packed_of
from vllm_dfloat.integration.loading.uncompressed import VECTORS, uncompressed

pytestmark = pytest.mark.engine
OURS = dict(quantization="dfloat11")


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unasked_models.save("gemma2", tmp_path_factory.mktemp("unasked") / "gemma2")


def test_embedding_whose_values_the_model_reads_stays_bf16_and_is_named(
    gemma: Path, tmp_path: Path, log_lines: list[str]
) -> None:
    # Bug caught: "linear on its weight, which is held compressed", for a model that was served before.
    model = of_class(gemma, tmp_path / "m", reading())
    assert answers(model, **OURS) == bf16_answers(model)
    (line,) = [line for line in log_lines if line.startswith("dfloat11: compressed")]
    assert "compressed 8 of 9 layers" in line
    assert f"not compressed: model.embed_tokens {2 * 256 * 128} bytes, " in line
    why = "dfloat11: left uncompressed: model.embed_tokens (the model's code reads its BF16 weight)"
    assert why in log_lines


@pytest.mark.parametrize(
    ("change", "is_compressed"),
    [
        (shares, True),
        (shares_memory, False),
        (shares_and_has_a_bias, False),
        (shares_with_a_linear, False),
    ],
)
def test_embedding_is_compressed_if_only_a_plain_head_shares_its_weight(
    change: Callable[[Any, Any], None], is_compressed: bool, gemma: Path, tmp_path: Path
) -> None:
    # Bug caught: an LM head, or another layer, left with a parameter into which nothing is ever loaded.
    model = of_class(gemma, tmp_path / "m", with_a_head(change))
    with loaded(model, **OURS) as served:
        embedding = served.model.embed_tokens
        assert (packed_of(embedding) is not None) == is_compressed
        assert (served.lm_head is embedding) == is_compressed
        if not is_compressed:
            assert torch.equal(served.lm_head.weight, embedding.weight)
            assert embedding.weight.count_nonzero() > 0


def test_attributes_that_a_model_set_on_the_parameter_are_kept(gemma: Path, tmp_path: Path) -> None:
    sharing_models.loaded_shapes.clear()
    model = of_class(gemma, tmp_path / "m", with_a_head(sharing_models.has_its_own_loader))
    with loaded(model, **OURS) as served:
        assert packed_of(served.model.embed_tokens) is not None
    assert (250, 128) in sharing_models.loaded_shapes


@pytest.mark.parametrize(
    ("ignore", "name"),
    [
        ("model.layers.1.mlp.down_proj", "model.layers.1.mlp.down_proj"),
        ("re:.*[01].mlp.down_proj", "model.layers.*.mlp.down_proj (2 of 4 layers)"),
        ("re:.*mlp.down_proj", "model.layers.*.mlp.down_proj"),
    ],
)
def test_a_star_stands_for_all_blocks_or_says_for_how_many(ignore: str, name: str) -> None:
    # Bug caught: one ignored layer was shown as that of every block.
    options = dict(additional_config={"dfloat11": {"ignore": [ignore]}})
    with loaded(SHIPPED, **OURS, **options) as served:
        assert set(uncompressed(served)) == {name, VECTORS}


def test_every_embedding_of_an_encoder_is_compressed(tmp_path: Path) -> None:
    made = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=260, hidden_size=128, intermediate_size=256, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=256, initializer_range=0.02,
        )
    )  # fmt: skip
    made.bfloat16().save_pretrained(tmp_path)
    pooling = dict(runner="pooling", skip_tokenizer_init=False, tokenizer=str(SHIPPED))
    with loaded(tmp_path, **OURS, **pooling) as served:
        held = {name for name, layer in served.named_modules() if packed_of(layer) is not None}
        left = uncompressed(served)
    assert any(name.endswith("word_embeddings") for name in held)
    assert any(name.endswith("position_embeddings") for name in held)
    assert set(left) - {VECTORS} <= {
        name for name in left if "pooler" in name or "token_type" in name
    }
