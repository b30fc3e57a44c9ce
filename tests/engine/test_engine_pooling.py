"""Models compressed on disk and served by a real vLLM for embeddings and scores, without an LM head."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models
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
    "llama": (  # vLLM leaves its LM head out
        "LlamaConfig",
        "LlamaForCausalLM",
        dict(head_dim=64, num_key_value_heads=1, tie_word_embeddings=False),
        "model.embed_tokens",
    ),
}
TOKENS = ["a", "b"]  # of the classifier of a reranker


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
def test_a_model_is_embedded_with_its_compressed_embedding(name: str, tmp_path: Path) -> None:
    # Bug caught: the word embedding, half of an encoder, left in BF16.
    model = save(name, tmp_path / "m")
    report = compress(open_source(model), tmp_path / "df11")
    assert MODELS[name][3] in open_checkpoint(tmp_path / "df11").units
    assert report.num_bytes < 0.75 * report.bf16_bytes
    expected = embeddings(model)
    assert embeddings(tmp_path / "df11") == expected
    assert len({tuple(embedding) for embedding in expected}) == len(PROMPTS)


def reranker(model: Path, method: str, new: Path | None = None, **settings: Any) -> Any:
    """Return the scores of a reranker whose classifier is made of rows of the tied LM head; with `new`, reloaded."""
    overrides = dict(
        architectures=["Qwen3ForSequenceClassification"],
        classifier_from_token=TOKENS,
        method=method,
    )
    settings |= dict(skip_tokenizer_init=False, tokenizer=str(SHIPPED), runner="pooling")
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    with engine(model, hf_overrides=overrides, **settings) as llm:
        found = [llm.classify(prompts, use_tqdm=False)]
        if new is not None:
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(new)})
            found.append(llm.classify(prompts, use_tqdm=False))
    return [[output.outputs.probs for output in outputs] for outputs in found]


@pytest.mark.parametrize(
    ("method", "vocabulary"), [("from_2_way_softmax", 256), ("no_post_processing", 260)]
)
def test_reranker_scores_with_rows_of_its_compressed_embedding(
    method: str, vocabulary: int, tmp_path: Path
) -> None:
    # Bug caught: "Cannot copy out of meta tensor". A vocabulary with padding is complete only at the very end.
    changes = dict(vocab_size=vocabulary, num_hidden_layers=1)
    model = tiny_models.save("qwen3", tmp_path / "m", **changes)
    compress(open_source(model), tmp_path / "df11")
    (expected,) = reranker(model, method)
    before, after = reranker(tmp_path / "df11", method, new=model, quantization="dfloat11")
    assert before == after == expected
    assert len({tuple(scores) for scores in expected}) == len(PROMPTS)


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
