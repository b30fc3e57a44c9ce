"""LM heads that are tied in unusual ways, or multiply in another dtype than the model's: the logits of BF16 vLLM."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from helpers import same_bits
from model_loads import loaded
from safetensors.torch import load_file, save_file
from small_models import bf16

from vllm_dfloat.convert.compress import compress
from vllm_dfloat.convert.source import open_source
from vllm_dfloat.integration.layers.method import packed_of

pytestmark = pytest.mark.engine

WIDTH, INNER, ROWS = 128, 128, 250  # the vocabulary has rows of padding
Settings = dict[str, Any]


def whisper(path: Path) -> Path:
    """An embedding of torch's own, whose parameter the LM head has."""
    torch.manual_seed(3)
    config = transformers.WhisperConfig(
        vocab_size=ROWS, num_mel_bins=80, d_model=WIDTH, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=INNER,
        decoder_ffn_dim=INNER, encoder_attention_heads=2, decoder_attention_heads=2, max_target_positions=128,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
    )  # fmt: skip
    transformers.WhisperForConditionalGeneration(config).bfloat16().save_pretrained(path)
    return path


def chatglm(path: Path) -> Path:
    """A head and an embedding, both vLLM's, that the model gives the same parameter."""
    path.mkdir()
    config = dict(
        architectures=["ChatGLMModel"], model_type="chatglm", num_layers=1, padded_vocab_size=ROWS, vocab_size=ROWS,
        hidden_size=WIDTH, ffn_hidden_size=INNER, kv_channels=64, num_attention_heads=2, seq_length=128,
        multi_query_attention=True, multi_query_group_num=1, add_bias_linear=False, add_qkv_bias=False, rmsnorm=True,
        apply_residual_connection_post_layernorm=False, layernorm_epsilon=1e-5, tie_word_embeddings=True,
        torch_dtype="bfloat16", post_layer_norm=True, original_rope=True, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    block = "transformer.encoder.layers.0"
    shapes = {
        "transformer.embedding.word_embeddings": (ROWS, WIDTH),
        "transformer.encoder.final_layernorm": (WIDTH,),
        f"{block}.input_layernorm": (WIDTH,),
        f"{block}.post_attention_layernorm": (WIDTH,),
        f"{block}.self_attention.query_key_value": (WIDTH + 2 * 64, WIDTH),
        f"{block}.self_attention.dense": (WIDTH, WIDTH),
        f"{block}.mlp.dense_h_to_4h": (2 * INNER, WIDTH),
        f"{block}.mlp.dense_4h_to_h": (WIDTH, INNER),
    }
    tensors = {
        f"{name}.weight": bf16(*((1, *shape)[-2:]), seed=i).view(shape)
        for i, (name, shape) in enumerate(shapes.items())
    }
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def qwen3(path: Path) -> Path:
    shape = dict(hidden_size=WIDTH, intermediate_size=INNER, num_attention_heads=2)
    return tiny_models.save("qwen3", path, **shape, vocab_size=ROWS, num_hidden_layers=1)


def llama(path: Path) -> Path:
    shape = dict(hidden_size=WIDTH, intermediate_size=INNER, num_attention_heads=2)
    return tiny_models.save("llama", path, **shape, vocab_size=ROWS, num_hidden_layers=1)


def ignoring(*names: str) -> Settings:
    return dict(quantization="dfloat11", additional_config={"dfloat11": {"ignore": list(names)}})


def logits(folder: Path, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of a few hidden states, and the embeddings of a few tokens."""
    with loaded(folder, **settings) as model:
        ids = torch.tensor([0, 7, ROWS - 1])
        given = bf16(3, WIDTH, seed=99)
        return model.compute_logits(given).clone(), model.embed_input_ids(ids).clone()


IGNORED = [(), ("re:.*(proj_out|output_layer|lm_head)",), ("re:.*embed.*",)]


@pytest.mark.parametrize("ignored", IGNORED, ids=["none", "head", "embedding"])
@pytest.mark.parametrize("make", [whisper, chatglm])
def test_head_that_has_the_parameter_of_an_embedding_multiplies_as_bf16_vllms(
    make: Callable[[Path], Path], ignored: tuple[str, ...], tmp_path: Path
) -> None:
    # Bug caught: Whisper died at its first request, and a tied ChatGLM was refused as incomplete.
    model = make(tmp_path / "m")
    expected = logits(model)
    folders = [model]
    if not ignored:
        compress(open_source(model), tmp_path / "df11", workers=1)
        folders.append(tmp_path / "df11")
    for folder in folders:
        for found, wanted in zip(logits(folder, **ignoring(*ignored)), expected, strict=True):
            assert same_bits(found, wanted)


@pytest.mark.parametrize("ignored", IGNORED, ids=["none", "head", "embedding"])
@pytest.mark.parametrize("make", [qwen3, llama], ids=["tied", "untied"])
def test_head_in_another_dtype_multiplies_as_bf16_vllms(
    make: Callable[[Path], Path], ignored: tuple[str, ...], tmp_path: Path, log_lines: list[str]
) -> None:
    # Bug caught: the first request died: "only supported for an unquantized lm_head".
    overrides = dict(hf_overrides={"head_dtype": "float32"})
    model = make(tmp_path / "m")
    found, wanted = logits(model, **overrides, **ignoring(*ignored)), logits(model, **overrides)
    assert found[0].dtype == wanted[0].dtype == torch.float32
    assert torch.equal(found[0], wanted[0])
    assert same_bits(found[1], wanted[1])
    if not ignored:
        assert sum("the LM head (vLLM reads its BF16 weight" in line for line in log_lines) == 1


def test_head_in_the_models_own_dtype_stays_compressed(tmp_path: Path) -> None:
    overrides = dict(hf_overrides={"head_dtype": "bfloat16"})
    with loaded(llama(tmp_path / "m"), quantization="dfloat11", **overrides) as model:
        assert packed_of(model.lm_head) is not None


@pytest.mark.parametrize("make", [whisper, chatglm])
def test_update_of_an_embedding_changes_the_head_that_has_its_parameter(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    # Bug caught: Whisper answered with the old LM head, of which vLLM's method keeps a packed copy on a CPU.
    model, other = make(tmp_path / "m"), make(tmp_path / "other")
    tiny_models.edit(other, lambda tensors: [tensor.mul_(-1.5) for tensor in tensors.values()])
    given, ids = bf16(3, WIDTH, seed=99), torch.tensor([0, 7, ROWS - 1])
    expected = logits(other)
    with loaded(model, quantization="dfloat11") as served:
        served.load_weights(load_file(other / "model.safetensors").items())
        assert same_bits(served.compute_logits(given), expected[0])
        assert same_bits(served.embed_input_ids(ids), expected[1])
