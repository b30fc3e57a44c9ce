"""Weights in files other than the model's own: those that vLLM may read are copied and compared, others are named."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_models import bf16, make_model

from vllm_dfloat.checkpoint.hub import NOT_FETCHED
from vllm_dfloat.checkpoint.manifest import MANIFEST_FILE, file_entry, read_manifest
from vllm_dfloat.checkpoint.side_files import side_files
from vllm_dfloat.cli import main
from vllm_dfloat.convert import compress
from vllm_dfloat.convert.source import open_source
from vllm_dfloat.errors import FormatError

Capture = pytest.CaptureFixture[str]
TENSORS = {
    "model.layers.0.mlp.up_proj.weight": bf16(64, 64),
    "model.norm.weight": bf16(1, 64)[0],
}
COPIED = (
    "2_Dense/config.json",
    "2_Dense/model.safetensors",
    "2_Dense/pytorch_model.bin",  # vLLM reads it if the other file holds no layer
    "3_Dense/pytorch_model.bin",
    "adapters/retrieval/adapter_model.safetensors",
    "colbert_linear.pt",
    "modules.json",
    "sharded/model-00001-of-00001.safetensors",
    "sharded/model.safetensors.index.json",
    "sparse_linear.pt",
    "speech/big.safetensors",  # larger than the model, but other tensors
    "value_head.safetensors.bak",
)
COPY = "holds the model's weights once more"
LEFT_OUT = {
    "checkpoint-5/model.safetensors": COPY,
    "checkpoint-5/optimizer.pt": "is the state of a training, of no use to serve",
    "consolidated.00.pth": COPY,
    "fp32/model-1.bin": COPY,
    "fp32/model-2.bin": COPY,
    "gguf/m.gguf": "is of a form that vLLM does not read beside safetensors",
    "model.safetensors.lock": "is a part of a download",
    "onnx/model.onnx": "is of a form that vLLM does not read beside safetensors",
    "original/consolidated.00.pth": COPY,
    "pytorch_model-00001-of-00001.bin": COPY,
    "pytorch_model.bin.index.json": COPY,
    "tf_model.h5": "is of a form that vLLM does not read beside safetensors",
}


def put(file: Path, content: bytes | dict[str, torch.Tensor]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        save_file(content, file)


def make_embedder(path: Path) -> Path:
    """Make a model with every kind of further weights, and all other files of COPIED and LEFT_OUT."""
    model = make_model(path, TENSORS, tie_word_embeddings=False)
    layers = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")]
    modules = [
        dict(idx=i, name=str(i), path=folder, type=f"sentence_transformers.models.{kind}")
        for i, (folder, kind) in enumerate(layers)
    ]
    put(model / "modules.json", json.dumps(modules).encode())
    dense = dict(in_features=64, out_features=8, bias=False)
    put(model / "2_Dense/config.json", json.dumps(dense).encode())
    small = {"linear.weight": bf16(8, 64)}
    large = {f"speech.{i}": bf16(64, 128, seed=i) for i in range(4)}
    for name in (*COPIED, *LEFT_OUT):
        if (model / name).exists():
            continue
        content: Any = small if name.endswith(".safetensors") else b"a pickle, never read"
        content = large if name.startswith("speech/") else content
        content = TENSORS if name == "checkpoint-5/model.safetensors" else content
        put(model / name, bytes(3000) if name.startswith("fp32/") else content)
    return model


@pytest.fixture
def embedder(tmp_path: Path) -> Path:
    return make_embedder(tmp_path / "m")


def test_what_vllm_may_read_is_copied_and_in_the_manifest_and_all_else_named(
    embedder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Bug caught: a Dense layer of an embedding model left out without a word; vLLM then serves the model without it.
    there, back = tmp_path / "t", tmp_path / "b"
    assert main(["compress", str(embedder), str(there), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["left_out"] == LEFT_OUT
    manifest = read_manifest(there)
    assert manifest is not None
    for name in COPIED:
        assert (there / name).read_bytes() == (embedder / name).read_bytes(), name
        assert manifest.files[name] == file_entry(embedder / name)
    for name in LEFT_OUT:
        assert not (there / name).exists()
    # The compressed folder holds only needed files: all of them are copied back.
    assert main(["decompress", str(there), str(back), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["left_out"] == {}
    for name in COPIED:
        assert (back / name).read_bytes() == (embedder / name).read_bytes(), name
    for folder in (there, back):
        assert main(["verify", str(folder), "--against", str(embedder)]) == 0
        assert ", 8 files of weights beside them)" in capsys.readouterr().out
    # The same is true without a manifest, as in checkpoints made by others.
    (there / MANIFEST_FILE).unlink()
    put(there / "original/consolidated.00.pth", b"x")
    shapes = ["--original", str(embedder)]
    assert main(["decompress", str(there), str(tmp_path / "c"), "--json", *shapes]) == 0
    assert json.loads(capsys.readouterr().out)["left_out"] == {"original/consolidated.00.pth": COPY}
    assert (tmp_path / "c/sparse_linear.pt").exists()


def test_kinds_of_what_is_left_out_have_a_line_each(
    embedder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(5):
        put(embedder / f"original/consolidated.{i:02}.pth", b"x")
    shutil.rmtree(embedder / "checkpoint-5")
    assert main(["compress", str(embedder), str(tmp_path / "t")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"gguf/m.gguf: is not copied: it {LEFT_OUT['gguf/m.gguf']}" in lines
    first, last = (f"original/consolidated.0{i}.pth" for i in (0, 4))
    assert f"5 files, {first} to {last}: are not copied: each {COPY}" in lines


def test_the_projector_that_vllm_makes_of_the_compressed_model_is_that_of_the_original(
    embedder: Path, tmp_path: Path
) -> None:
    adapters = pytest.importorskip("vllm.model_executor.models.adapters")
    assert main(["compress", str(embedder), str(tmp_path / "t"), "--quiet"]) == 0
    made = []
    for folder in (embedder, tmp_path / "t"):
        config = SimpleNamespace(model=str(folder), revision=None, head_dtype=torch.float32)
        made.append(adapters._load_st_projector(config))
    assert len(made[0]) == 1
    assert torch.equal(made[0][0].weight, bf16(8, 64).float())
    assert torch.equal(made[1][0].weight, made[0][0].weight)


@pytest.mark.parametrize("name", ["2_Dense/model.safetensors", "sparse_linear.pt"])
@pytest.mark.parametrize("change", ["remove", "flip"])
def test_verify_against_finds_other_weights_beside_the_models_own(
    name: str, change: str, embedder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Bug caught: "equal to the original", although a layer was missing.
    target = tmp_path / "t"
    assert main(["compress", str(embedder), str(target), "--quiet"]) == 0
    (target / MANIFEST_FILE).unlink()
    if change == "remove":
        (target / name).unlink()
    else:
        data = bytearray((target / name).read_bytes())
        data[-1] ^= 1
        (target / name).write_bytes(data)
    capsys.readouterr()
    assert main(["verify", str(target), "--against", str(embedder)]) == 1
    line, last = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{name}: not in {target}" if change == "remove" else f"{name}: sha256 ")
    assert " in 1 tensor or file (" in last


@pytest.mark.parametrize("command", ["inspect", "verify", "decompress"])
def test_a_folder_with_weights_that_was_not_copied_with_the_checkpoint_is_missed(
    command: str, embedder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", str(embedder), str(tmp_path / "t"), "--quiet"]) == 0
    shutil.rmtree(tmp_path / "t/2_Dense")
    more = [str(tmp_path / "b")] if command == "decompress" else []
    assert main([command, str(tmp_path / "t"), *more]) == 2
    assert "2_Dense/model.safetensors is missing" in capsys.readouterr().err


@pytest.mark.parametrize("link", ["2_Dense/model.safetensors", "2_Dense"])
def test_a_layer_that_is_a_link_to_elsewhere_is_refused_not_left_out(
    link: str, embedder: Path, tmp_path: Path
) -> None:
    shutil.move(embedder / link, tmp_path / "elsewhere")
    (embedder / link).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match=rf"m/{link}: is a link to .*; modules.json says that"):
        open_source(embedder)


def test_a_layer_that_is_a_git_lfs_pointer_is_refused(embedder: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    put(embedder / "2_Dense/model.safetensors", pointer)
    with pytest.raises(FormatError, match=r"2_Dense/model.safetensors: is a Git LFS pointer"):
        open_source(embedder)


@pytest.mark.parametrize(
    "modules", ["[", "{}", "[1]", '[{"path": 5}]', '[{"path": "."}, {"path": "../x"}]', "null"]
)
def test_modules_that_say_nothing_change_nothing(modules: str, embedder: Path) -> None:
    (embedder / "2_Dense/pytorch_model.bin").unlink()  # copied if it belongs to a layer
    before = side_files(embedder)
    (embedder / "modules.json").write_text(modules)
    os.utime(embedder / "modules.json", ns=(0, 0))
    assert side_files(embedder) == before


def test_weights_that_the_index_does_not_name_have_a_line(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", TENSORS)
    index = {"weight_map": dict.fromkeys(TENSORS, "model.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": bf16(4, 4)}, model / "readout.safetensors")
    save_file(TENSORS, model / "consolidated.safetensors")
    assert open_source(model).files.side.left_out == {
        "consolidated.safetensors": COPY,
        "readout.safetensors": "is not named by the model's index, so it is no part of the model",
    }


def test_of_a_hub_model_all_is_fetched_that_is_copied() -> None:
    # Bug caught: every *.bin and *.pt skipped, including layers of the model.
    hub = pytest.importorskip("huggingface_hub.utils")
    names = [*COPIED, *LEFT_OUT, "model.safetensors", "tokenizer.json"]
    fetched = set(hub.filter_repo_objects(names, ignore_patterns=NOT_FETCHED))
    assert fetched >= {*COPIED, "model.safetensors", "tokenizer.json"}
    passed_over = {
        "original/consolidated.00.pth",
        "pytorch_model-00001-of-00001.bin",
        "gguf/m.gguf",
    }
    assert not fetched & passed_over


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return make_model(tmp_path / "plain", TENSORS, tie_word_embeddings=False)


def test_forced_run_leaves_nothing_of_the_model_that_was_there(
    embedder: Path, plain: Path, tmp_path: Path
) -> None:
    # Bug caught: layers of the previous model stayed, and vLLM served the new model with them.
    out, back = tmp_path / "out", tmp_path / "back"
    assert main(["compress", str(embedder), str(out)]) == 0
    assert main(["decompress", str(out), str(back)]) == 0
    (out / "mine.txt").write_text("mine")
    assert main(["compress", str(plain), str(out), "--force"]) == 0
    assert main(["decompress", str(out), str(back), "--force"]) == 0
    for folder in (out, back):
        left = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        assert not left & set(COPIED)
    assert (out / "mine.txt").exists()
    assert main(["verify", str(out), "--against", str(plain)]) == 0
    assert main(["compress", str(plain), str(out)]) == 0


@pytest.mark.parametrize("name", ["9_Dense/model.safetensors", "stale.pt", "modules.json"])
def test_what_an_interrupted_run_has_left_and_the_source_has_not_is_named(
    name: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    out = tmp_path / "out"
    real = compress.read_back

    def leave(target: Path, tensors: Any) -> None:
        put(target / name, b"{}")
        real(target, tensors)

    monkeypatch.setattr(compress, "read_back", leave)
    assert main(["compress", str(plain), str(out)]) == 2
    assert f"{out / name}: is no part of the model that was made here" in capsys.readouterr().err
    assert main(["verify", str(out)]) == 2  # unfinished
    monkeypatch.undo()
    (out / name).unlink()
    assert main(["compress", str(plain), str(out)]) == 0


def test_foreign_weights_in_a_folder_that_is_forced_are_named_before_anything_is_encoded(
    plain: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    put(out / "adapter/adapter_model.bin", b"x")
    put(out / "model.safetensors", TENSORS)
    before = sorted(out.rglob("*"))
    command = ["compress", str(plain), str(out), "--force"]
    assert main(command) == 2
    assert "adapter_model.bin: is no part of the model" in capsys.readouterr().err
    assert (
        sorted(out.rglob("*")) == before
    )  # nothing is removed, and no journal calls it unfinished
    (out / "adapter/adapter_model.bin").unlink()
    assert main(command) == 0


@pytest.mark.parametrize("name", ["3_Dense/pytorch_model.bin", "sparse_linear.pt"])
@pytest.mark.parametrize("cut", [False, True])
def test_other_weights_that_are_missing_or_cut_are_seen_when_the_folder_is_opened(
    name: str, cut: bool, embedder: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    assert main(["compress", str(embedder), str(out)]) == 0
    content = (out / name).read_bytes()
    (out / name).unlink()
    if cut:
        (out / name).write_bytes(content[:-1])
    assert main(["inspect", str(out)]) == 2
    assert name in capsys.readouterr().err


def test_other_weights_that_a_hub_cache_has_not_fetched_yet_may_be_missing(
    embedder: Path, tmp_path: Path, capsys: Capture
) -> None:
    # Bug caught: a snapshot of json and safetensors only, as vLLM fetches them, was called damaged.
    (tmp_path / "models--org--name/blobs").mkdir(parents=True)
    out = tmp_path / "models--org--name/snapshots/abc"
    assert main(["compress", str(embedder), str(out)]) == 0
    (out / "sparse_linear.pt").unlink()
    assert main(["inspect", str(out)]) == 0
    (out / "2_Dense/model.safetensors").unlink()
    assert main(["inspect", str(out)]) == 2
    assert "2_Dense/model.safetensors is missing" in capsys.readouterr().err


def test_listed_weights_that_are_a_link_to_elsewhere_are_refused_not_left_out(
    embedder: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    assert main(["compress", str(embedder), str(out)]) == 0
    (out / "sparse_linear.pt").rename(tmp_path / "elsewhere.pt")
    (out / "sparse_linear.pt").symlink_to(tmp_path / "elsewhere.pt")
    assert main(["decompress", str(out), str(tmp_path / "back")]) == 2
    assert f"{out / 'sparse_linear.pt'}: is a link to" in capsys.readouterr().err


def test_hidden_layer_is_refused_not_left_out(plain: Path, tmp_path: Path, capsys: Capture) -> None:
    put(plain / ".dense/model.safetensors", {"linear.weight": bf16(8, 64)})
    put(plain / "modules.json", json.dumps([dict(path="x/../.dense")]).encode())
    assert main(["compress", str(plain), str(tmp_path / "out")]) == 2
    assert f"{plain / '.dense'}: is hidden" in capsys.readouterr().err


def test_nothing_is_written_or_removed_through_a_link_out_of_the_folder(
    embedder: Path, tmp_path: Path, capsys: Capture
) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    assert main(["compress", str(embedder), str(out)]) == 0
    (out / "2_Dense").rename(elsewhere)
    (out / "2_Dense").symlink_to(elsewhere)
    before = {file.name: file.read_bytes() for file in elsewhere.iterdir()}
    assert main(["compress", str(embedder), str(out), "--force"]) == 2
    assert f"{out / '2_Dense'}: is a link out of the folder" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in elsewhere.iterdir()} == before
