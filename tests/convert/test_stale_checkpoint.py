"""A BF16 model saved into the folder of an older DFloat11 checkpoint: nothing of that gets into what is made."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_commands import only_line
from safetensors.torch import save_file
from small_models import bf16, make_model

from vllm_dfloat.checkpoint.listing import INDEX_FILE
from vllm_dfloat.checkpoint.manifest import MANIFEST_FILE, read_manifest
from vllm_dfloat.cli import main
from vllm_dfloat.convert import compress as module
from vllm_dfloat.convert.resume import COMPRESSION, resumable
from vllm_dfloat.convert.source import open_source
from vllm_dfloat.convert.work import Work

CONFIG = {"tie_word_embeddings": False}


def tensors(seed: int) -> dict[str, torch.Tensor]:
    return {
        "model.embed_tokens.weight": bf16(96, 64, seed=seed),
        "model.layers.0.mlp.up_proj.weight": bf16(64, 64, seed=seed + 1),
        "model.norm.weight": bf16(1, 64, seed=seed + 2)[0],
        "lm_head.weight": bf16(96, 64, seed=seed + 3),
    }


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Return a folder with a model in one shard and an index, and with the files of an older checkpoint."""
    old = make_model(tmp_path / "old", tensors(0), **CONFIG)
    folder = tmp_path / "mixed"
    assert main(["compress", str(old), str(folder), "--quiet"]) == 0
    (folder / "model.safetensors").unlink(missing_ok=True)
    shard = "model-00001-of-00001.safetensors"
    save_file(tensors(10), folder / shard, {"format": "pt"})
    index = {"weight_map": dict.fromkeys(tensors(10), shard)}
    (folder / INDEX_FILE).write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def test_the_weights_that_are_compressed_are_those_of_the_index(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Bug caught: files of the older checkpoint, which its manifest lists, copied over those just made and compared.
    new, out, back = (
        make_model(tmp_path / "new", tensors(10), **CONFIG),
        tmp_path / "t",
        tmp_path / "b",
    )
    assert main(["compress", str(mixed), str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in ("lm_head.safetensors", "model_layers_0.safetensors"):
        reason = "it is not named by the model's index, so it is no part of the model"
        assert f"{name}: is not copied: {reason}" in lines
    assert main(["decompress", str(out), str(back)]) == 0
    for folder in (out, back):
        for original in (new, mixed):
            assert main(["verify", str(folder), "--against", str(original)]) == 0
        assert main(["verify", str(folder), "--against", str(tmp_path / "old")]) == 1


def test_a_manifest_beside_a_model_that_is_not_compressed_says_nothing(
    mixed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Bug caught: "files are not as the manifest says", of a manifest that is not this model's.
    assert main(["verify", str(mixed)]) == 0
    assert "none of them compressed" in only_line(capsys.readouterr().out)


def test_a_folder_with_the_name_of_a_file_to_be_made_is_refused_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Bug caught: "File exists.", after everything was encoded.
    model = make_model(tmp_path / "m", tensors(0), **CONFIG)
    index = {"weight_map": dict.fromkeys(tensors(0), "model.safetensors")}
    (model / INDEX_FILE).write_text(json.dumps(index))
    (model / "lm_head.safetensors").mkdir()
    (model / "lm_head.safetensors/notes.txt").write_text("x")
    command = ["compress", str(model), str(tmp_path / "t")]
    assert main(command) == 2
    line = only_line(capsys.readouterr().err)
    assert (
        "lm_head.safetensors/notes.txt: has the place of lm_head.safetensors, which is made" in line
    )
    assert not (tmp_path / "t").exists()
    shutil.move(model / "lm_head.safetensors", tmp_path)
    assert main(command) == 0


WRITES = {
    "copy": lambda work, source: work.copy(source, "a", None),
    "text": lambda work, source: work.write_text("a", "other"),
    "line": lambda work, source: work.append(
        {"file": "a", "num_bytes": 3, "sha256": work.entries["a"]["sha256"]}
    ),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_finished_file_is_never_written_again(
    write: Callable[[Work, Path], None], tmp_path: Path
) -> None:
    source, target = tmp_path / "s", tmp_path / "t"
    source.mkdir()
    (source / "a").write_text("old")
    with resumable(source, target, COMPRESSION, "identity", False, {"a"}) as work:
        work.write_text("a", "new")
        with pytest.raises(RuntimeError, match="is finished, and was to be written again"):
            write(work, source)
    assert (target / "a").read_text() == "new"


def test_a_file_made_twice_by_interrupted_runs_is_taken_once(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", tensors(0), **CONFIG)

    def interrupted(*arguments: object) -> Any:
        raise KeyboardInterrupt

    out = tmp_path / "t"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "read_back", interrupted)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                module.compress(open_source(model), out)
            file = out / "lm_head.safetensors"
            intact = file.read_bytes()
            file.write_bytes(b"damaged")  # so that the second run makes it anew
        file.write_bytes(intact)
    module.compress(open_source(model), out)
    assert main(["verify", str(out), "--against", str(model)]) == 0


def test_what_replaces_a_compared_file_is_noticed_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The manifest has the checksums of the files as they were compared, and what lies there is held against them.
    model = make_model(tmp_path / "m", tensors(0), **CONFIG)
    other = make_model(tmp_path / "o", tensors(10), **CONFIG)
    assert main(["compress", str(other), str(tmp_path / "other-df11"), "--quiet"]) == 0
    out = tmp_path / "t"
    real = Work.write_text

    def replaced(self: Work, name: str, text: str) -> None:
        if name == MANIFEST_FILE:
            shutil.copy(tmp_path / "other-df11/lm_head.safetensors", out)
        real(self, name, text)

    monkeypatch.setattr(Work, "write_text", replaced)
    assert main(["compress", str(model), str(out)]) == 2
    assert "lm_head.safetensors: was changed by another program" in only_line(
        capsys.readouterr().err
    )
    monkeypatch.undo()
    assert main(["compress", str(model), str(out)]) == 0
    assert main(["verify", str(out), "--against", str(model)]) == 0
    manifest = read_manifest(out)
    assert manifest is not None
    assert (
        manifest.files["lm_head.safetensors"]["bytes"]
        == (out / "lm_head.safetensors").stat().st_size
    )
