"""Members of units as plain tensors: shapes, names, order, and refusals."""

import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from dfloat11_helpers import (
    MODEL_VECTORS,
    VECTORS,
    edge_originals,
    encode,
    original_shapes,
    originals,
    sha256,
    stored_unit,
    write_checkpoint,
)
from safetensors.torch import save_file

from vllm_dfloat.checkpoint.members import plan
from vllm_dfloat.checkpoint.reader import Dfloat11Checkpoint, open_checkpoint
from vllm_dfloat.checkpoint.shapes import model_shapes, resolve_shape
from vllm_dfloat.checkpoint.weights import iter_weights, weights
from vllm_dfloat.errors import FormatError, UnsupportedError


@pytest.mark.parametrize("vector", [v for v in MODEL_VECTORS if "single" not in v])
def test_shapes_from_the_config_give_the_original_tensors(vector: str) -> None:
    directory = VECTORS / f"{vector}-df11"
    shapes = model_shapes(directory)
    checkpoint = open_checkpoint(directory)
    expected = originals()[vector]
    found = {}
    for name, tensor in weights(checkpoint, shapes):
        assert tensor.dtype == torch.bfloat16
        assert tensor.is_contiguous()
        found[name] = {
            "shape": list(tensor.shape),
            "sha256": sha256(tensor.view(torch.uint16).numpy()),
        }
    assert found == expected


def test_config_without_a_model_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match=r"llama-tiny-single-df11/config.json: transformers"):
        model_shapes(VECTORS / "llama-tiny-single-df11")


def test_without_a_model_members_can_be_decoded_flat() -> None:
    checkpoint = open_checkpoint(VECTORS / "edge-good-df11")
    whole = edge_originals()["block"]
    found = {item.name: (item.start, item.stop, item.shape) for item in plan(checkpoint, None)}  # type: ignore[union-attr]
    assert found["block.a.weight"] == (0, 3072, (1, 3072))
    assert found["block.b.weight"] == (3072, 3600, (1, 528))
    assert found["block.c.weight"] == (3600, 4105, (1, 505))
    assert found["nine.weight"] == (0, 9, (1, 9))
    assert whole.size == 4105


def _layered(path: Path, layers: list[int]) -> Dfloat11Checkpoint:
    """Write layers with a q|k unit, biases and a norm; return the open checkpoint."""
    rng = np.random.default_rng(0)
    units = {}
    plain = {"model.norm.weight": torch.ones(4, dtype=torch.bfloat16)}
    for layer in layers:
        bits = (rng.integers(110, 120, 48) << 7).astype(np.uint16)
        units[f"model.layers.{layer}"] = encode(bits, (32,))
        for leaf in ("q_proj.bias", "k_proj.bias", "q_norm.weight"):
            plain[f"model.layers.{layer}.{leaf}"] = torch.zeros(4, dtype=torch.bfloat16)
        plain[f"model.layers.{layer}.router.bias"] = torch.zeros(4, dtype=torch.float32)
        plain[f"model.layers.{layer}.router.weight"] = torch.zeros(2, 2, dtype=torch.float32)
    write_checkpoint(path, units, {r"model\.layers\.\d+": ["q_proj", "k_proj"]})
    save_file(plain, path / "rest.safetensors")
    return open_checkpoint(path)


def test_bias_follows_its_weight_and_layers_come_in_numerical_order(tmp_path: Path) -> None:
    # Bug caught: a bias before its layer's first weight, which vLLM does not count.
    checkpoint = _layered(tmp_path, list(range(11)))
    shapes = {
        f"model.layers.{i}.{n}": s
        for i in range(11)
        for n, s in (("q_proj", (8, 4)), ("k_proj", (4, 4)))
    }
    names = [name for name, _ in weights(checkpoint, shapes)]
    leaves = ["q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias", "q_norm.weight",
              "router.weight", "router.bias"]  # fmt: skip
    assert names == [f"model.layers.{i}.{leaf}" for i in range(11) for leaf in leaves] + [
        "model.norm.weight"
    ]


def test_plain_tensors_keep_their_dtype(tmp_path: Path) -> None:
    found = dict(weights(_layered(tmp_path, [0]), {"q_proj": (8, 4), "k_proj": (4, 4)}))
    assert found["model.layers.0.router.weight"].dtype == torch.float32
    assert found["model.layers.0.q_proj.bias"].dtype == torch.bfloat16
    assert found["model.norm.weight"].tolist() == [1, 1, 1, 1]


def test_skipped_names_are_neither_decoded_nor_given_out() -> None:
    checkpoint = open_checkpoint(VECTORS / "llama-tiny-df11")
    names = [
        n for n, _ in weights(checkpoint, original_shapes("llama-tiny"), lambda n: "layers" in n)
    ]
    assert names == ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]


@pytest.mark.parametrize("tied", [True, False, None])
def test_stored_lm_head_is_given_out_whatever_the_config_ties(
    tied: bool | None, tmp_path: Path
) -> None:
    # Bug caught: a stored LM head left out because the config ties it; vLLM sees it in the files and waits for it.
    stored = stored_unit("llama-tiny", "lm_head")
    directory = write_checkpoint(tmp_path, {"lm_head": stored, "model.embed_tokens": stored})
    config = json.loads((directory / "config.json").read_text())
    if tied is not None:
        config["text_config"] = {"tie_word_embeddings": tied}
    (directory / "config.json").write_text(json.dumps(config))
    shapes = {"lm_head": (256, 256), "model.embed_tokens": (256, 256)}
    names = [name for name, _ in iter_weights(open_checkpoint(directory), shapes)]
    assert names == ["lm_head.weight", "model.embed_tokens.weight"]


def test_members_do_not_keep_each_other_alive() -> None:
    # Bug caught: tensors that are views of one decoded layer, and keep the whole layer in memory.
    stream = iter_weights(
        open_checkpoint(VECTORS / "llama-tiny-df11"), original_shapes("llama-tiny")
    )
    alive = []
    for name, bits in stream:
        if ".mlp." in name or ".self_attn." in name:
            assert bits.base is None or bits.base.size == bits.size
            alive.append(weakref.ref(bits))
        del bits
        assert sum(ref() is not None for ref in alive) <= 1


def test_list_of_a_module_that_is_itself_the_weight_is_ignored(tmp_path: Path) -> None:
    directory = write_checkpoint(
        tmp_path, {"head": stored_unit("edge-good", "odd77")}, {"head": ["a", "b"]}
    )
    checkpoint = open_checkpoint(directory)
    assert [name for name, _ in iter_weights(checkpoint, {"head": (7, 11)})] == ["head.weight"]
    with pytest.raises(FormatError, match="found 1 weight; 2 are expected by pattern_dict: a, b"):
        list(iter_weights(checkpoint, {"head.a": (7, 11)}))


def test_unit_of_another_size_than_the_model_is_refused_before_decoding() -> None:
    checkpoint = open_checkpoint(VECTORS / "llama-tiny-df11")
    shapes = original_shapes("llama-tiny") | {"model.layers.1.mlp.up_proj": (288, 255)}
    message = (
        r"^\S+/model_layers_1.safetensors: model.layers.1.split_positions: model.layers.1.mlp.up_proj "
        r"has 73728 weights in the file; the model has \[288, 255\] = 73440\."
    )
    with pytest.raises(FormatError, match=message):
        next(iter(weights(checkpoint, shapes)))


def test_damage_in_any_unit_is_found_before_the_first_tensor(tmp_path: Path) -> None:
    good, bad = stored_unit("edge-good", "odd77"), stored_unit("edge-good", "odd77")
    bad["luts"][-1, 255] = 3
    write_checkpoint(tmp_path, {"a": good, "z": bad})
    with pytest.raises(FormatError, match=r"z.luts: exponent 255"):
        next(iter_weights(open_checkpoint(tmp_path), {"a": (7, 11), "z": (7, 11)}))


GEMMA = {
    "model.language_model.layers.0.self_attn.q_proj": (2048, 1152),
    "model.language_model.layers.1.self_attn.q_proj": (2048, 1152),
    "model.vision_tower.encoder.layers.0.self_attn.q_proj": (1152, 1152),
}


def test_older_prefix_is_matched_by_the_longest_equal_tail_of_that_size() -> None:
    path = "language_model.model.layers.0.self_attn.q_proj"
    assert resolve_shape(path, 2048 * 1152, GEMMA, "f") == (2048, 1152)
    assert resolve_shape(path, 1152 * 1152, GEMMA, "f") == (1152, 1152)


def test_no_module_of_that_size_is_refused_with_the_nearest() -> None:
    with pytest.raises(FormatError, match=r"x\.layers\.0\.self_attn\.q_proj has 7 weights .*1152"):
        resolve_shape("x.layers.0.self_attn.q_proj", 7, GEMMA, "file: u")
    with pytest.raises(FormatError, match="nearest: none"):
        resolve_shape("lm_head", 7, GEMMA, "file: u")


def test_modules_that_differ_in_shape_only_are_refused() -> None:
    model = {"a.layers.0.up": (8, 6), "b.layers.0.up": (6, 8)}
    with pytest.raises(FormatError, match=r"a.layers.0.up \[8, 6\] or b.layers.0.up \[6, 8\]"):
        resolve_shape("c.layers.0.up", 48, model, "file: u")


def test_gemma_3_names_of_old_checkpoints_find_their_shapes() -> None:
    from transformers import Gemma3Config

    text = {"num_hidden_layers": 1, "vocab_size": 512, "hidden_size": 128, "intermediate_size": 96}
    vision = {
        "num_hidden_layers": 1,
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_attention_heads": 4,
    }
    shapes = model_shapes(Gemma3Config(text_config=text, vision_config=vision))
    path = "language_model.model.layers.0.mlp.gate_proj"
    assert path not in shapes  # the reason for the fallback
    assert resolve_shape(path, 96 * 128, shapes, "file") == (96, 128)
