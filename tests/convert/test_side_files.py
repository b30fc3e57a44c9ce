"""Files copied in addition to the weights: the model's own files, never the target of a link out of its folder."""

import json
import os
import shutil
from pathlib import Path

import pytest
from interrupted import contents
from small_models import bf16, make_model

from vllm_dfloat.checkpoint.side_files import SideFiles, side_files
from vllm_dfloat.checkpoint.verify import compare
from vllm_dfloat.cli import main
from vllm_dfloat.convert.compress import compress
from vllm_dfloat.convert.decompress import decompress
from vllm_dfloat.convert.source import open_source
from vllm_dfloat.errors import ChangedError, FormatError

TENSORS = {"model.layers.0.mlp.up_proj.weight": bf16(64, 64)}
SECRET = "nobody else's business"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """Return a folder outside of every model, with a file in it."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "secret").write_text(SECRET)
    return folder


def link_out(model: Path, secret: Path) -> dict[str, str]:
    """Put links of every kind into a model's folder; return those that must not be copied -> their messages."""
    (model / "sub").mkdir()
    (model / "sub/own.txt").write_text("own")
    (model / "tokenizer.json").write_text("{}")
    (model / "inside.txt").symlink_to("sub/own.txt")
    (model / "sub/up.json").symlink_to("../tokenizer.json")
    (model / "LICENSE.txt").symlink_to(secret / "secret")
    (model / "sub/LICENSE.txt").symlink_to("../../elsewhere/secret")
    (model / "chain.txt").symlink_to("LICENSE.txt")
    (model / "assets").symlink_to(secret)
    (model / "sub/assets").symlink_to(secret)
    (model / "again").symlink_to("sub")
    (model / "loop").symlink_to("loop")
    (model / "around").symlink_to(model)
    (model / "gone.txt").symlink_to("nowhere")
    os.mkfifo(model / "pipe")
    outside = f"is a link to {secret / 'secret'}, outside of the model's folder"
    return {
        **dict.fromkeys(("LICENSE.txt", "chain.txt", "sub/LICENSE.txt"), outside),
        **dict.fromkeys(("again", "around", "assets", "sub/assets"), "is a link to a folder"),
        "gone.txt": "is a link that leads nowhere (No such file or directory)",
        "loop": "is a link that leads nowhere (Too many levels of symbolic links)",
        "pipe": "is no regular file",
    }


COPIED = {"inside.txt": "own", "sub/own.txt": "own", "sub/up.json": "{}", "tokenizer.json": "{}"}


def test_links_that_lead_outside_are_left_out_with_a_line_each(
    secret: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Bug caught: the target of a link, copied as a file of the model.
    model = make_model(tmp_path / "m", TENSORS)
    left_out = link_out(model, secret)
    assert main(["compress", str(model), str(tmp_path / "t")]) == 0
    *lines, _ = capsys.readouterr().out.splitlines()
    assert sorted(lines) == sorted(
        f"{name}: is not copied: it {why}" for name, why in left_out.items()
    )
    check_copied(tmp_path / "t")
    # Decompression treats additional files of a compressed checkpoint in the same way.
    shutil.rmtree(tmp_path / "t/sub")
    for name in ("inside.txt", "tokenizer.json"):
        (tmp_path / "t" / name).unlink()
    left_out = link_out(tmp_path / "t", secret)
    assert main(["decompress", str(tmp_path / "t"), str(tmp_path / "b")]) == 0
    *lines, _ = capsys.readouterr().out.splitlines()
    assert len(lines) == len(left_out)
    check_copied(tmp_path / "b")


def check_copied(folder: Path) -> None:
    for name, content in COPIED.items():
        assert (folder / name).read_text() == content
    for path in folder.rglob("*"):
        assert not path.is_symlink(), path
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
    weights = {path.name for path in folder.glob("*.safetensors*")}
    assert set(contents(folder)) == {
        *COPIED, *weights, "config.json", *({"dfloat11_manifest.json"} & set(os.listdir(folder))),
    }  # fmt: skip


def test_what_is_left_out_is_in_the_json_too(
    secret: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model(tmp_path / "m", TENSORS)
    left_out = link_out(model, secret)
    for command in (
        ["compress", model, tmp_path / "t"],
        ["decompress", tmp_path / "t", tmp_path / "b"],
    ):
        assert main([*map(str, command), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["left_out"] == left_out
        left_out = {}


def test_many_links_are_few_lines(
    secret: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model(tmp_path / "m", TENSORS)
    for i in range(25):
        (model / f"{i:02}.txt").symlink_to(secret / "secret")
        (model / f"gone{i:02}.txt").symlink_to(f"nowhere{i}")
    for i in range(22):
        (model / f"{i}").mkdir()
        (model / f"{i}/a.txt").symlink_to(secret / "secret")
    assert main(["compress", str(model), str(tmp_path / "t")]) == 0
    *lines, _ = capsys.readouterr().out.splitlines()
    assert len(lines) == 21
    outside = f"each is a link to {secret / 'secret'}, outside of the model's folder"
    assert lines[0] == f"25 files, 00.txt to 24.txt: are not copied: {outside}"
    assert lines[1].startswith("25 files, gone00.txt to gone24.txt: are not copied: each is a link")
    assert lines[-1] == "... and 4 more files are not copied"


def hub_cache(root: Path, model: Path) -> Path:
    """Return a snapshot as huggingface_hub makes it: every file is a link to a blob."""
    repo = root / "models--some--model"
    snapshot = repo / "snapshots/0123abc"
    (repo / "blobs").mkdir(parents=True)
    for number, file in enumerate(path for path in sorted(model.rglob("*")) if path.is_file()):
        blob = repo / "blobs" / f"{number:064x}"
        shutil.copy(file, blob)
        link = snapshot / file.relative_to(model)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.mark.parametrize("place", ["", "linked"])
def test_a_snapshot_of_the_hub_cache_is_copied_whole(place: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", TENSORS)
    (model / "tokenizer.json").write_text("{}")
    (model / "sub").mkdir()
    (model / "sub/own.txt").write_text("own")
    snapshot = hub_cache(tmp_path / "hub", model)
    if place:
        (tmp_path / place).symlink_to(tmp_path / "hub")
        snapshot = tmp_path / place / snapshot.relative_to(tmp_path / "hub")
    report = compress(open_source(snapshot), tmp_path / "t")
    assert report.left_out == {}
    compress(open_source(model), tmp_path / "expected")
    assert contents(tmp_path / "t") == contents(tmp_path / "expected")
    # Compressed checkpoints are fetched from the hub too.
    again = decompress(hub_cache(tmp_path / "hub2", tmp_path / "t"), tmp_path / "b")
    assert again.left_out == {}
    assert (tmp_path / "b/sub/own.txt").read_text() == "own"


def test_a_folder_that_only_looks_like_a_hub_cache_leads_nowhere_else(
    secret: Path, tmp_path: Path
) -> None:
    # Bug caught: a repository with `blobs` linked to a home directory, and a link through it.
    repo = tmp_path / "models--some--model"
    (repo / "snapshots").mkdir(parents=True)
    (repo / "blobs").symlink_to(secret)
    snapshot = make_model(repo / "snapshots/abc", TENSORS)
    (snapshot / "LICENSE").symlink_to("../../blobs/secret")
    (snapshot / "other").symlink_to("../../refs")
    assert side_files(snapshot).names == ()
    shutil.rmtree(snapshot)
    (repo / "blobs").unlink()
    (repo / "blobs").mkdir()
    (repo / "refs").write_text(SECRET)
    snapshot = make_model(repo / "snapshots/abc", TENSORS)
    (snapshot / "other").symlink_to("../../refs")
    found = side_files(snapshot)
    assert found == SideFiles((), {"other": found.left_out["other"]})


def test_weights_and_a_config_that_are_links_to_another_disk_are_read(tmp_path: Path) -> None:
    other = make_model(tmp_path / "disk", TENSORS, model_type="llama")
    model = tmp_path / "m"
    model.mkdir()
    for name in ("model.safetensors", "config.json"):
        (model / name).symlink_to(other / name)
    compress(open_source(model), tmp_path / "t")
    assert compare(tmp_path / "t", other).is_equal
    assert not (tmp_path / "t/config.json").is_symlink()
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in (tmp_path / "t").iterdir():
        (linked / file.name).symlink_to(file)
    decompress(linked, tmp_path / "b")
    assert compare(tmp_path / "b", other).is_equal


def test_a_config_that_leads_to_what_is_no_models_is_refused(secret: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", TENSORS)
    (secret / "secret").write_text(json.dumps({"auths": {"registry": "token"}}))
    (model / "config.json").unlink()
    (model / "config.json").symlink_to(secret / "secret")
    with pytest.raises(FormatError, match=r"is a link to .*secret, outside .* Put a copy"):
        compress(open_source(model), tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_a_file_that_becomes_a_link_before_it_is_copied_is_not_copied(
    secret: Path, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "m", TENSORS)
    (model / "LICENSE").write_text("mine")
    source = open_source(model)
    (model / "LICENSE").unlink()
    (model / "LICENSE").symlink_to(secret / "secret")
    with pytest.raises(ChangedError, match="LICENSE: was changed"):
        compress(source, tmp_path / "t")
    assert not (tmp_path / "t/LICENSE").exists()


def test_hidden_files_are_passed_over_in_silence(secret: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", TENSORS)
    (model / ".git").mkdir()
    (model / ".git/config").write_text("x")
    (model / ".cache").symlink_to(secret)
    (model / ".hidden").symlink_to(secret / "secret")
    assert side_files(model) == SideFiles((), {})


def test_a_folder_that_cannot_be_listed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Bug caught: exit 0 without the weights of a layer whose folder may be entered, but not listed.
    model = make_model(tmp_path / "model", TENSORS)
    closed = model / "2_Dense"
    closed.mkdir()
    scandir = os.scandir

    def refusing(
        path: str | Path = ".",
    ) -> object:  # what another user sees; root may list everything
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(FormatError, match=r"2_Dense: cannot be listed \(Permission denied\)"):
        compress(open_source(model), tmp_path / "out")
