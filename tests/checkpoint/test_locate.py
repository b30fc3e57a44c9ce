"""Paths that users give in place of a model's folder: the error says what the path is, and names usable folders."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from cli_commands import make_places, only_line
from safetensors.numpy import save_file
from small_models import bf16, make_model

from vllm_dfloat.cli import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_places(tmp_path_factory.mktemp("places"))


def refused(capsys: Capture, *arguments: object) -> str:
    """Run a command that must exit with 2; return its one line."""
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return only_line(err)


def commands(kind: str, given: Path, places: dict[str, Path], new: Path) -> list[list[object]]:
    """Return the commands that read a folder of this kind, with `given` in its place."""
    if kind == "bf16":
        return [["compress", given, new], ["verify", places["df11"], "--against", given]]
    return [["decompress", given, new], ["verify", given], ["inspect", given]]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("kind", ["bf16", "df11"])
def test_a_file_in_place_of_its_folder_is_called_one_and_its_folder_does(
    kind: str, name: str, places: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    # Bug caught: "no such folder" for a path that is an existing file.
    given = places[kind] / name
    if not given.exists():
        given = next(places[kind].glob("*.safetensors"))
    for command in commands(kind, given, places, tmp_path / "new"):
        line = refused(capsys, *command)
        assert line.startswith(f"vllm-dfloat: {given}: is a file; expected the folder of a ")
        assert line.endswith(f". Give its folder, {given.parent}.")
        assert (
            main([str(given.parent if argument == given else argument) for argument in command])
            == 0
        )
        capsys.readouterr()


def test_a_file_whose_folder_would_not_do_is_not_recommended(
    places: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    given = places["bf16"] / "model.safetensors"
    line = refused(capsys, "decompress", given, tmp_path / "new")
    assert line.endswith(
        f"is a file; expected the folder of a DFloat11 checkpoint. Its folder is {places['bf16']}."
    )
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/config.json").write_text("{}")
    line = refused(capsys, "inspect", tmp_path / "alone/config.json")
    assert f"There is none in {tmp_path / 'alone'}" in line


@pytest.mark.parametrize("name", ["out/model.safetensors", "out/config.json"])
def test_a_file_as_the_target_is_called_one_and_its_folder_named(
    name: str, places: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / name).write_text("mine")
    for command, source in (("compress", "bf16"), ("decompress", "df11")):
        line = refused(capsys, command, places[source], tmp_path / name)
        assert (
            f"{tmp_path / name}: is a file in the folder {tmp_path / 'out'}; expected a new" in line
        )
    assert (tmp_path / name).read_text() == "mine"


def hub_cache(root: Path, model: Path, commits: dict[str, bool]) -> Path:
    """Make a model's cache as the hub's library does: files in blobs/, and per commit a snapshot of links.

    Args:
        commits: commit -> whether its snapshot has weights.
    """
    blobs = root / "blobs"
    blobs.mkdir(parents=True)
    for commit, has_weights in commits.items():
        (root / "snapshots" / commit).mkdir(parents=True)
        for file in model.iterdir():
            if has_weights or file.suffix == ".json":
                shutil.copy(file, blobs / f"{commit}-{file.stem}")
                link = root / "snapshots" / commit / file.name
                link.symlink_to(Path("..", "..", "blobs", f"{commit}-{file.stem}"))
    (root / "refs").mkdir()
    (root / "refs/main").write_text(list(commits)[-1])
    return root


@pytest.mark.parametrize("below", ["", "snapshots", "blobs", "blobs/f00-config", ".."])
@pytest.mark.parametrize("kind", ["bf16", "df11"])
def test_a_hub_cache_names_the_snapshots_that_would_do_the_main_one_first(
    kind: str, below: str, places: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    root = hub_cache(
        tmp_path / "hub/models--org--name", places[kind], {"a00": True, "b00": False, "f00": True}
    )
    given = Path(os.path.normpath(root / below))
    for command in commands(kind, given, places, tmp_path / "new"):
        line = refused(capsys, *command)
        named = [root / "snapshots" / commit for commit in ("f00", "a00")]
        if below == "":
            assert "is of the hub's cache, in which the snapshots are folders of the model" in line
        assert line.endswith(f" Give {named[0]} or {named[1]}."), line
        assert main([str(named[0] if argument == given else argument) for argument in command]) == 0
        capsys.readouterr()


def test_a_file_in_a_snapshot_names_that_snapshot(
    places: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    root = hub_cache(tmp_path / "models--org--name", places["bf16"], {"a00": True, "f00": True})
    snapshot = root / "snapshots/a00"
    line = refused(capsys, "inspect", snapshot / "model.safetensors")
    assert line.endswith(f"Give its folder, {snapshot}.")


def test_a_hub_cache_without_weights_says_so(
    places: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    root = hub_cache(tmp_path / "models--org--name", places["bf16"], {"a00": False})
    line = refused(capsys, "compress", root, tmp_path / "new")
    assert line.endswith(f"There is none in {root}: fetch the model again, or give another.")


def pipeline(root: Path, model: Path) -> Path:
    """Make a pipeline as diffusers stores it: a BF16 transformer, a text encoder in float32, a scheduler."""
    root.mkdir()
    (root / "model_index.json").write_text(json.dumps({"_class_name": "SomePipeline"}))
    (root / "transformer").mkdir()
    shutil.copy(model / "config.json", root / "transformer")
    shutil.copy(
        model / "model.safetensors", root / "transformer/diffusion_pytorch_model.safetensors"
    )
    (root / "text_encoder").mkdir()
    (root / "text_encoder/config.json").write_text("{}")
    save_file({"a.weight": np.zeros((8, 8), np.float32)}, root / "text_encoder/model.safetensors")
    (root / "scheduler").mkdir()
    (root / "scheduler/scheduler_config.json").write_text("{}")
    return root


def test_a_pipeline_names_the_models_in_it_that_would_do(
    places: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    root = pipeline(tmp_path / "flux", places["bf16"])
    line = refused(capsys, "compress", root, tmp_path / "new")
    assert "is a pipeline of several models (model_index.json), each in a folder of its own" in line
    assert line.endswith(f" Give {root / 'transformer'}.")  # the encoder holds nothing to compress
    assert main(["compress", str(root / "transformer"), str(tmp_path / "new"), "--quiet"]) == 0
    line = refused(capsys, "inspect", root)
    assert line.endswith(f" Give {root / 'text_encoder'} or {root / 'transformer'}.")
    line = refused(capsys, "compress", root / "model_index.json", tmp_path / "other")
    assert line.endswith(
        f": is a file; expected the folder of a BF16 model. Give {root / 'transformer'}."
    )
    # In addition to the folders, some pipelines hold one of the models a second time.
    shutil.copy(places["bf16"] / "model.safetensors", root / "flux1-dev.safetensors")
    line = refused(capsys, "compress", root, tmp_path / "other")
    assert line.endswith(f" Give {root / 'transformer'}.")


def test_of_many_folders_some_are_named(
    places: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    for i in range(9):
        shutil.copytree(places["bf16"], tmp_path / "all" / f"model-{i}")
    line = refused(capsys, "inspect", tmp_path / "all")
    assert (
        "all: holds no *.safetensors file itself; expected the folder of a checkpoint. Give "
        in line
    )
    assert line.endswith(f"all/model-3 or another in {tmp_path / 'all'}.")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("flux", "flux/text_encoder or {root}/flux/transformer."),
        ("flux/model_index.json", "flux/text_encoder or {root}/flux/transformer."),
        (
            "flux/transformer/diffusion_pytorch_model.safetensors",
            "Give its folder, {root}/flux/transformer.",
        ),
        ("models--org--name", "models--org--name/snapshots/f00."),
    ],
)
def test_plan_names_the_folders_with_a_config(
    given: str, expected: str, places: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    # Bug caught: "is not valid JSON" for a weights file, "no config.json in it" for a cache.
    pipeline(tmp_path / "flux", places["bf16"])
    hub_cache(tmp_path / "models--org--name", places["bf16"], {"f00": True})
    line = refused(capsys, "plan", tmp_path / given, "--gpu-memory", "24GiB")
    assert line.endswith(expected.format(root=tmp_path)), line


def test_a_checkpoint_whose_own_weights_are_gone_is_not_taken_for_a_folder_of_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Bug caught: the advice to give 2_Dense, a layer of the model.
    source = make_model(tmp_path / "s", {"model.layers.0.mlp.up_proj.weight": bf16(64, 64)})
    (source / "2_Dense").mkdir()
    (source / "modules.json").write_text('[{"path": "2_Dense"}]')
    save_file(
        {"linear.weight": np.zeros((4, 4), np.float32)}, source / "2_Dense" / "model.safetensors"
    )
    assert main(["compress", str(source), str(tmp_path / "out"), "--quiet"]) == 0
    for file in (tmp_path / "out").glob("*.safetensors"):
        file.unlink()
    assert main(["verify", str(tmp_path / "out")]) != 0
    said = capsys.readouterr()
    assert "2_Dense" not in said.err + said.out
