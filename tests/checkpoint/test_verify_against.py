"""`vllm-dfloat verify --against`: equal means that an engine cannot answer otherwise, by these weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import bf16, make_model

from vllm_dfloat.checkpoint.manifest import MANIFEST_FILE
from vllm_dfloat.cli import main

Capture = pytest.CaptureFixture[str]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TENSORS = {
    EMBEDDING: bf16(96, 64),
    "model.layers.0.mlp.up_proj.weight": bf16(32, 64, seed=1),
    "model.norm.weight": bf16(1, 64, seed=2)[0],
}
HEADS = {
    "none": {},
    "equal": {HEAD: TENSORS[EMBEDDING].clone()},
    "other": {HEAD: bf16(96, 64, seed=3)},
    "longer": {HEAD: bf16(97, 64)},
    "bias": {"lm_head.bias": bf16(1, 96, seed=4)[0]},
}


def model(folder: Path, head: str, is_tied: bool) -> Path:
    return make_model(folder, {**TENSORS, **HEADS[head]}, tie_word_embeddings=is_tied)


def compressed(folder: Path, head: str, is_tied: bool, way: str) -> Path:
    """Make a model in one of the ways in which a checkpoint may store it."""
    if way == "plain":
        return model(folder, head, is_tied)
    # Compressed as one that is not tied, so that its head is a unit too; then its config says that it is.
    source = model(folder.with_name("source"), head, is_tied=is_tied and way == "stored")
    assert main(["compress", str(source), str(folder), "--quiet"]) == 0
    (folder / MANIFEST_FILE).unlink()
    config = folder / "config.json"
    config.write_text(config.read_text().replace("false", str(is_tied).lower()))
    return folder


@pytest.mark.parametrize("way", ["unit", "stored", "plain"])
@pytest.mark.parametrize("head", HEADS)
def test_head_that_only_the_checkpoint_stores_must_be_the_tied_embedding(
    head: str, way: str, tmp_path: Path, capsys: Capture
) -> None:
    # Bug caught: "equal", with a head of its own that vLLM serves and the original has not.
    folder = compressed(tmp_path / "d", head, True, way)
    original = model(tmp_path / "b", "none", is_tied=True)
    capsys.readouterr()
    is_equal = head in ("none", "equal")
    assert main(["verify", str(folder), "--against", str(original)]) == (0 if is_equal else 1)
    out = capsys.readouterr().out
    if not is_equal:
        name = "lm_head.bias" if head == "bias" else HEAD
        assert f"{name}: not in {original}, where the embedding takes its place" in out
        assert "DIFFERENT" in out
    if head == "other":
        assert f"({EMBEDDING}: " in out


@pytest.mark.parametrize("way", ["unit", "plain"])
@pytest.mark.parametrize("head", HEADS)
def test_head_that_only_the_original_stores_must_be_the_tied_embedding(
    head: str, way: str, tmp_path: Path, capsys: Capture
) -> None:
    folder = compressed(tmp_path / "d", "none", True, way)
    original = model(tmp_path / "b", head, is_tied=True)
    capsys.readouterr()
    is_equal = head in ("none", "equal")
    assert main(["verify", str(folder), "--against", str(original)]) == (0 if is_equal else 1)
    if not is_equal:
        assert f": not in {folder}, where the embedding takes its place" in capsys.readouterr().out


@pytest.mark.parametrize("lacks", ["checkpoint", "original"])
def test_head_that_config_does_not_tie_is_missed_though_it_is_the_embedding(
    lacks: str, tmp_path: Path
) -> None:
    heads = ("none", "equal") if lacks == "checkpoint" else ("equal", "none")
    folder = compressed(tmp_path / "d", heads[0], False, "plain")
    original = model(tmp_path / "b", heads[1], is_tied=False)
    assert main(["verify", str(folder), "--against", str(original)]) == 1


def reshaped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: tensor.reshape(tensor.shape[::-1]) if tensor.dim() == 2 else tensor
        for name, tensor in tensors.items()
    }


def test_shapes_are_those_of_the_manifest_not_of_the_original(
    tmp_path: Path, capsys: Capture
) -> None:
    # Bug caught: "equal", with the same bytes in other matrices than vLLM and decompress make of the checkpoint.
    source = model(tmp_path / "s", "other", is_tied=False)
    folder = tmp_path / "d"
    assert main(["compress", str(source), str(folder), "--quiet"]) == 0
    original = Path(shutil.copytree(source, tmp_path / "o"))
    save_file(reshaped(load_file(source / "model.safetensors")), original / "model.safetensors")
    assert main(["verify", str(folder), "--against", str(original)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert f"{EMBEDDING}: BF16[96, 64] against BF16[64, 96]" in lines
    assert "model.layers.0.mlp.up_proj.weight: BF16[32, 64] against BF16[64, 32]" in lines
    assert main(["verify", str(folder), "--against", str(source)]) == 0


def test_original_with_other_sizes_is_different_where_the_manifest_has_the_shapes(
    tmp_path: Path, capsys: Capture
) -> None:
    source = model(tmp_path / "s", "other", is_tied=False)
    folder = tmp_path / "d"
    assert main(["compress", str(source), str(folder), "--quiet"]) == 0
    larger = make_model(tmp_path / "o", {**TENSORS, HEAD: bf16(100, 64)}, tie_word_embeddings=False)
    assert main(["verify", str(folder), "--against", str(larger)]) == 1
    assert f"{HEAD}: BF16[96, 64] against BF16[100, 64]" in capsys.readouterr().out


def test_files_that_vllm_reads_are_named_where_they_are_not_alike(
    tmp_path: Path, capsys: Capture
) -> None:
    # Bug caught: "equal" and nothing more, with the generation_config.json of another model.
    source = model(tmp_path / "s", "other", is_tied=False)
    folder = tmp_path / "d"
    for name in ("tokenizer.json", "merges.txt", "README.md"):
        (source / name).write_text(name)
    assert main(["compress", str(source), str(folder), "--quiet"]) == 0
    assert main(["verify", str(folder), "--against", str(source)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    (folder / "generation_config.json").write_text("{}")
    (folder / "merges.txt").unlink()
    for name in ("tokenizer.json", "README.md", "mine.txt"):
        (folder / name).write_text("another")
    assert main(["verify", str(folder), "--against", str(source)]) == 0  # the weights are equal
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines == [
        f"generation_config.json: only in {folder}; it holds no weights, but vLLM reads it",
        f"merges.txt: only in {source}; it holds no weights, but vLLM reads it",
        f"tokenizer.json: other bytes in {folder} than in {source}; it holds no weights, but vLLM reads it",
    ]
    assert last.endswith("; other files that are not alike: 3")
    assert main(["verify", str(folder), "--against", str(source), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [line.partition(":")[0] for line in found["other_files"]] == [
        "generation_config.json",
        "merges.txt",
        "tokenizer.json",
    ]
    assert main(["verify", str(folder), "--against", str(source), "--quiet"]) == 0
    assert capsys.readouterr().out == ""


def test_what_modules_json_names_is_compared_too(tmp_path: Path, capsys: Capture) -> None:
    # Bug caught: another pooling, in a folder that only modules.json names, and "equal" without a word.
    source, folder = model(tmp_path / "s", "other", is_tied=False), tmp_path / "d"
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    (source / "modules.json").write_text('[{"path": "1_Pooling"}]')
    assert main(["compress", str(source), str(folder), "--quiet"]) == 0
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    (folder / "modules.json").write_text("[]")
    capsys.readouterr()
    assert main(["verify", str(folder), "--against", str(source)]) == 0
    *lines, _ = capsys.readouterr().out.splitlines()
    assert [line.partition(": other bytes")[0] for line in lines] == [
        "1_Pooling/config.json",
        "modules.json",
    ]
