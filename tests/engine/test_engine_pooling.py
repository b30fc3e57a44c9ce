"""Encoders and other models without an LM head, compressed on disk and served for embeddings by a real vLLM."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from engines import PROMPTS, engine
from tiny_models import SHIPPED

from vllm_dfloat.checkpoint.reader import open_checkpoint
from vllm_dfloat.convert.compress import compress
from vllm_dfloat.convert.source import open_source

pytestmark = pytest.mark.engine

SHAPE: dict[str, Any] = dict(
    vocab_size=260, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=130, initializer_range=0.02,
)  # fmt: skip
# name: (config class, model class, what differs from SHAPE, module path of the word embedding)
MODELS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "bert": ("BertConfig", "BertModel", {}, "embeddings.word_embeddings"),
    "qwen3": (
        "Qwen3Config",
        "Qwen3Model",
        dict(head_dim=64, num_key_value_heads=1, tie_word_embeddings=True),
        "embed_tokens",
    ),
}


def save(name: str, path: Path) -> Path:
    config, model, differences, _ = MODELS[name]
    torch.manual_seed(7)
    made = getattr(transformers, model)(getattr(transformers, config)(**{**SHAPE, **differences}))
    for parameter in made.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=parameter.data.mean().item(), std=0.02)
    made.bfloat16().save_pretrained(path)
    return path


def embeddings(model: Path, **settings: Any) -> list[list[float]]:
    settings |= dict(skip_tokenizer_init=False, tokenizer=str(SHIPPED))  # embed asks for one
    with engine(model, runner="pooling", **settings) as llm:
        outputs = llm.embed([{"prompt_token_ids": prompt} for prompt in PROMPTS], use_tqdm=False)
    return [list(output.outputs.embedding) for output in outputs]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_without_lm_head_is_served_from_its_compressed_embedding(
    name: str, tmp_path: Path
) -> None:
    # Bug caught: the word embedding, half of an encoder, left in BF16.
    model = save(name, tmp_path / "m")
    report = compress(open_source(model), tmp_path / "df11")
    assert MODELS[name][3] in open_checkpoint(tmp_path / "df11").units
    assert report.num_bytes < 0.75 * report.bf16_bytes
    expected = embeddings(model)
    assert embeddings(tmp_path / "df11") == expected
    assert len({tuple(embedding) for embedding in expected}) == len(PROMPTS)


def test_layers_in_files_of_their_own_are_loaded_beside_a_compressed_model(tmp_path: Path) -> None:
    # Bug caught: BGE-M3's sparse_linear.pt and colbert_linear.pt neither copied nor read with DFloat11 files.
    made = transformers.XLMRobertaModel(transformers.XLMRobertaConfig(**SHAPE, pad_token_id=1))
    made.bfloat16().save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    config["architectures"] = ["BgeM3EmbeddingModel"]
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    width = SHAPE["hidden_size"]
    for name, rows in (("sparse_linear", 1), ("colbert_linear", width)):
        layer = {"weight": torch.randn(rows, width), "bias": torch.randn(rows)}
        torch.save(layer, tmp_path / f"m/{name}.pt")
    compress(open_source(tmp_path / "m"), tmp_path / "df11")
    shutil.rmtree(tmp_path / "m")
    settings = dict(skip_tokenizer_init=False, tokenizer=str(SHIPPED), runner="pooling")
    with engine(tmp_path / "df11", **settings) as llm:
        (found,) = llm.apply_model(
            lambda model: {
                f"{name}.{part}": value.detach().clone()
                for name in ("sparse_linear", "colbert_linear")
                for part, value in getattr(model, name).named_parameters()
            }
        )
    assert len(found) == 4
    for name, value in found.items():
        file, part = name.split(".")
        stored = torch.load(tmp_path / f"df11/{file}.pt", weights_only=True)[part]
        assert torch.equal(value, stored.to(value.dtype)), name
