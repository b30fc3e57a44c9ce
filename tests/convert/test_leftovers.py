"""Files of another model in the folder that is made: ours are removed, those of others refused, and none stays."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from cli_commands import only_line
from small_models import bf16, make_model

from vllm_dfloat.checkpoint.folder import COMPRESS_JOURNAL, DECOMPRESS_JOURNAL, FINISHED_FILE
from vllm_dfloat.checkpoint.serving_files import is_served_beside
from vllm_dfloat.cli import main
from vllm_dfloat.convert.work import Work

Capture = pytest.CaptureFixture[str]
TENSORS = {
    "model.layers.0.mlp.up_proj.weight": bf16(64, 64),
    "model.norm.weight": bf16(1, 64)[0],
}
READ = (
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "qwen.tiktoken",
    "tekken.json",
    "params.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "hf_quant_config.json",
    "adapter_config.json",
    "modeling_custom.py",
    "image_processing_custom.py",
)
NOT_READ = ("README.md", "LICENSE.txt", "mine.txt", "notes.json", "run.py", "sub/tokenizer.json")


def write(folder: Path, *names: str, text: str = "{}") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Give a model with nothing beside its weights but a tokenizer."""
    model = make_model(tmp_path / "source", TENSORS, tie_word_embeddings=False)
    write(model, "tokenizer.json", text='{"of": "source"}')
    return model


@pytest.fixture
def rich(tmp_path: Path) -> Path:
    """Give another model, with everything that vLLM reads."""
    model = make_model(tmp_path / "rich", TENSORS, tie_word_embeddings=False)
    write(model, *READ, *NOT_READ)
    return model


@pytest.mark.parametrize("name", READ)
def test_what_vllm_reads_beside_weights_is_known(name: str) -> None:
    assert is_served_beside(name)


@pytest.mark.parametrize("name", NOT_READ)
def test_what_vllm_does_not_read_may_lie_anywhere(name: str) -> None:
    assert not is_served_beside(name)


def test_files_of_a_foreign_model_are_refused_by_name_and_the_folder_is_not_touched(
    source: Path, rich: Path, capsys: Capture
) -> None:
    # Bug caught: exit 0, and vLLM samples by the generation_config.json of the model that was there before.
    before = {name: (rich / name).read_bytes() for name in names(rich)}
    command = ["compress", str(source), str(rich), "--force"]
    moved = rich.with_name("moved")
    for _ in range(len(READ)):
        if main(command) == 0:
            break
        line = only_line(capsys.readouterr().err)
        assert "is no part of the model that was made here, and would change it" in line
        assert line.endswith("out of the folder, and run the same command again.")
        assert {name: (rich / name).read_bytes() for name in names(rich)} == before
        name = line.removeprefix(f"vllm-dfloat: {rich}/").partition(":")[0]
        (moved / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(rich / name, moved / name)
        del before[name]
    assert names(moved) == set(READ) - {"tokenizer.json"}  # which the source has: it is replaced
    assert (rich / "tokenizer.json").read_text() == '{"of": "source"}'
    assert names(rich) >= set(NOT_READ)
    assert main(["verify", str(rich), "--against", str(source)]) == 0


def test_the_first_files_are_named_at_once(source: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "t"
    write(out, *(f"{letter}_config.json" for letter in "abcdef"))
    assert main(["compress", str(source), str(out), "--force"]) == 2
    line = only_line(capsys.readouterr().err)
    assert f"{out}/a_config.json: is no part" in line
    assert "so are b_config.json, c_config.json, d_config.json and 2 more" in line
    assert names(out) == {f"{letter}_config.json" for letter in "abcdef"}


@pytest.mark.parametrize("command", ["compress", "decompress"])
def test_forced_run_removes_what_an_interrupted_one_has_copied(
    command: str, source: Path, rich: Path, tmp_path: Path, capsys: Capture
) -> None:
    # Bug caught: the journal did not list the files that were copied, so nothing knew whose they were.
    first, second = rich, source
    if command == "decompress":
        for model in (first, second):
            assert main(["compress", str(model), f"{model}-d", "--quiet"]) == 0
        first, second = Path(f"{first}-d"), Path(f"{second}-d")
    out = tmp_path / "t"
    interrupt([command, str(first), str(out)])
    assert names(out) >= set(READ)
    write(out, "mine.md")
    capsys.readouterr()
    assert main([command, str(second), str(out)]) == 2
    assert "give --force to start anew" in only_line(capsys.readouterr().err)
    assert main([command, str(second), str(out), "--force", "--quiet"]) == 0
    beside = {name for name in names(out) if ".safetensors" not in name}
    ours = {FINISHED_FILE, "config.json", "dfloat11_manifest.json"}
    assert beside - ours == {"tokenizer.json", "mine.md"}
    assert main(["verify", str(out), "--against", str(source)]) == 0


def interrupt(command: list[str]) -> None:
    """Run a command that is ended when everything beside the weights was copied."""

    def stop(*arguments: object) -> Any:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Work, "write_text", stop)
        assert main(command) == 130


@pytest.mark.parametrize("command", ["compress", "decompress"])
def test_the_journal_of_another_model_is_judged_before_its_files(
    command: str, source: Path, tmp_path: Path, capsys: Capture
) -> None:
    # Bug caught: finished files of a run that could go on were said to belong there no more, and to be moved away.
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": bf16(64, 64, seed=i) for i in range(3)}
    begun = make_model(tmp_path / "begun", tensors, tie_word_embeddings=False)
    if command == "decompress":
        for model in (begun, source):
            assert main(["compress", str(model), f"{model}-d", "--quiet"]) == 0
        begun, source = Path(f"{begun}-d"), Path(f"{source}-d")
    write(begun, "added_tokens.json")
    out = tmp_path / "t"
    interrupt([command, str(begun), str(out)])
    write(out, "stranger.safetensors")
    before = names(out)
    capsys.readouterr()
    assert main([command, str(source), str(out)]) == 2
    line = only_line(capsys.readouterr().err)
    assert f"{out}: holds the beginning of a {command}ion of other weights" in line
    assert line.endswith("give --force to start anew, or choose another folder.")
    assert names(out) == before
    (out / "stranger.safetensors").unlink()
    assert main([command, str(begun), str(out), "--quiet"]) == 0


def test_run_of_the_other_task_with_force_removes_what_was_copied_too(
    source: Path, rich: Path, tmp_path: Path
) -> None:
    out = tmp_path / "t"
    interrupt(["compress", str(rich), str(out)])
    assert main(["compress", str(source), str(tmp_path / "d"), "--quiet"]) == 0
    assert main(["decompress", str(tmp_path / "d"), str(out), "--force", "--quiet"]) == 0
    assert not names(out) & {COMPRESS_JOURNAL, DECOMPRESS_JOURNAL, *READ} - {"tokenizer.json"}
    assert (out / "tokenizer.json").read_text() == '{"of": "source"}'


def test_forced_run_that_is_killed_while_it_removes_still_knows_what_to_remove(
    source: Path, rich: Path, tmp_path: Path
) -> None:
    # Bug caught: the journal was emptied first, and with it the list.
    out = tmp_path / "t"
    interrupt(["compress", str(rich), str(out)])
    command = ["compress", str(source), str(out), "--force", "--quiet"]

    def killed(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".json":
            raise KeyboardInterrupt
        os.unlink(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        assert main(command) == 130
    assert names(out) & set(READ)
    assert main(command) == 0
    assert not names(out) & set(READ) - {"tokenizer.json"}


def test_what_the_source_no_longer_has_is_removed_when_a_run_goes_on(
    rich: Path, tmp_path: Path
) -> None:
    out = tmp_path / "t"
    interrupt(["compress", str(rich), str(out)])
    (rich / "added_tokens.json").unlink()
    assert main(["compress", str(rich), str(out), "--quiet"]) == 0
    assert names(out) & set(READ) == set(READ) - {"added_tokens.json"}


def test_what_was_added_to_a_finished_folder_and_changes_answers_is_named(
    source: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "t"
    command = ["compress", str(source), str(out)]
    assert main(command) == 0
    write(out, "generation_config.json")
    assert main(command) == 2
    line = only_line(capsys.readouterr().err)
    assert f"{out / 'generation_config.json'}: was added since its folder was finished" in line
    assert main([*command, "--force"]) == 2  # not ours, so it is not removed
    (out / "generation_config.json").unlink()
    assert main(command) == 0


KINDS = {
    "folder for a unit": (
        "model_layers_0.safetensors/x",
        "model_layers_0.safetensors: is a folder",
    ),
    "folder for the config": ("config.json/x", "config.json: is a folder"),
    "folder for what is copied": ("tokenizer.json/x", "tokenizer.json: is a folder"),
    "folder for the manifest": ("dfloat11_manifest.json/x", "dfloat11_manifest.json: is a folder"),
    "folder for the journal": (f"{COMPRESS_JOURNAL}/x", f"{COMPRESS_JOURNAL}: is a folder"),
    "folder for the note": (f"{FINISHED_FILE}/x", f"{FINISHED_FILE}: is a folder"),
    "folder named as weights": ("old.safetensors/x", "old.safetensors: is a folder"),
    "file for a folder": ("sub", "sub: is no folder; expected a folder, for sub/a.txt"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_entry_of_the_wrong_kind_is_named_and_moving_it_helps(
    kind: str, source: Path, tmp_path: Path, capsys: Capture
) -> None:
    # Bug caught: "Is a directory." or "File exists.", after hours.
    entry, found = KINDS[kind]
    out = tmp_path / "t"
    write(source, "sub/a.txt")
    write(out, entry)
    command = ["compress", str(source), str(out), "--force"]
    assert main(command) == 2
    line = only_line(capsys.readouterr().err)
    assert f"{out}/{found}" in line
    assert line.endswith("Move it out of the folder, and run the same command again.")
    shutil.move(out / Path(entry).parts[0], tmp_path / "moved")
    assert main(command) == 0


@pytest.mark.parametrize("kind", ["file", "link", "loop", "below a file", "below a link"])
@pytest.mark.parametrize("command", ["compress", "decompress"])
def test_target_that_can_be_no_folder_is_refused_with_advice(
    command: str, kind: str, source: Path, tmp_path: Path, capsys: Capture
) -> None:
    # Bug caught: "File exists." and "Not a directory."
    place = tmp_path / "place"
    if kind.endswith("file"):
        place.write_text("x")
    else:
        place.symlink_to(place if kind == "loop" else "nowhere")
    out = place / "t" if kind.startswith("below") else place
    if command == "decompress":
        assert main(["compress", str(source), str(tmp_path / "d"), "--quiet"]) == 0
        source = tmp_path / "d"
    assert main([command, str(source), str(out)]) == 2
    line = only_line(capsys.readouterr().err)
    assert line.startswith(f"vllm-dfloat: {out}: {'lies in' if out != place else 'is'} a ")
    assert line.endswith("Choose another, or move that away.")
    place.unlink()
    assert main([command, str(source), str(out)]) == 0


def test_a_link_in_place_of_a_file_is_replaced_not_followed(source: Path, tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "t", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.write_text("mine")
    for name, leads in (("config.json", elsewhere), ("tokenizer.json", tmp_path / "nowhere")):
        (out / name).symlink_to(leads)
    assert main(["compress", str(source), str(out), "--force"]) == 0
    assert elsewhere.read_text() == "mine"
    assert json.loads((out / "config.json").read_text())
    assert not (tmp_path / "nowhere").exists()
