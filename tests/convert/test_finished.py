"""The same command again on a finished folder: nothing to do, or a sentence about the change."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_commands import make_places, only_line
from interrupted import contents

from vllm_dfloat.checkpoint.folder import COMPRESS_JOURNAL, FINISHED_FILE
from vllm_dfloat.cli import main
from vllm_dfloat.convert import conversion

Capture = pytest.CaptureFixture[str]


@pytest.fixture(params=["compress", "decompress"])
def command(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """Return a command that has finished, with a side file in its source."""
    places = make_places(tmp_path)
    source = places["bf16" if request.param == "compress" else "df11"]
    (source / "tokenizer.json").write_text("{}")
    arguments = [request.param, str(source), str(tmp_path / "t")]
    assert main([*arguments, "--quiet"]) == 0
    return arguments


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.iterdir()}


def weights(folder: str) -> Path:
    return min(Path(folder).glob("*.safetensors"))


def flip_last_byte(file: Path) -> None:
    """Change a weight of a file in place and restore its time, as a program that hides the change would."""
    status = file.stat()
    with file.open("rb+") as stream:
        stream.seek(-1, os.SEEK_END)
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([byte[0] ^ 1]))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_finished_folder_is_said_to_be_finished_with_exit_0_and_not_touched(
    command: list[str], capsys: Capture
) -> None:
    # Bug caught: "is not empty; give --force", so that a script fails when it is run again.
    before = state(Path(command[2]))
    assert main(command) == 0
    out, err = capsys.readouterr()
    said = "was finished before, and neither its files nor its source have changed since: "
    assert said in only_line(out)
    assert err == ""
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["was_finished"] is True
    assert state(Path(command[2])) == before
    assert main([*command, "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["was_finished"] is False


def replaced(folder: str) -> None:
    """Replace a model by another one with the same names, shapes, sizes and file times."""
    model = Path(folder)
    other = Path(shutil.copytree(model, model.with_name("other")))
    flip_last_byte(weights(str(other)))
    shutil.rmtree(model)
    other.rename(model)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda source: flip_last_byte(weights(source)), "safetensors"),
        (replaced, ""),
        (lambda source: Path(source, "tokenizer.json").write_text("[]"), "tokenizer.json"),
        (lambda source: Path(source, "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda source: Path(source, "added.json").write_text("{}"), "added.json"),
    ],
)
def test_a_source_that_changed_since_is_named(
    change: Callable[[str], object], name: str, command: list[str], capsys: Capture
) -> None:
    change(command[1])
    before = state(Path(command[2]))
    assert main(command) == 2
    line = only_line(capsys.readouterr().err)
    assert line.startswith(f"vllm-dfloat: {command[1]}")
    assert f"{name}: is not what {command[2]} was made from: " in line
    assert line.endswith("Give --force to make it anew, or compare the two with verify --against.")
    assert state(Path(command[2])) == before


def test_another_source_is_refused_though_its_files_look_the_same(
    command: list[str], tmp_path: Path, capsys: Capture
) -> None:
    other = Path(shutil.copytree(command[1], tmp_path / "other"))  # with the same times
    flip_last_byte(weights(str(other)))
    assert main([command[0], str(other), command[2]]) == 2
    assert f"is not what {command[2]} was made from: " in only_line(capsys.readouterr().err)


def put_the_clock_back(target: str) -> None:
    """Make the note of a time that is still to come, as it is when the clock was put back afterwards."""
    soon = time.time() + 3600
    os.utime(Path(target) / FINISHED_FILE, (soon, soon))


def change_while_the_clock_is_back(target: str) -> None:
    """Change a file at a time before the note's, and let the clock pass that time afterwards."""
    soon = time.time() + 0.2
    os.utime(Path(target) / FINISHED_FILE, (soon, soon))
    flip_last_byte(weights(target))
    while time.time() <= soon:
        time.sleep(0.05)


@pytest.mark.parametrize(
    "change",
    [
        lambda target: flip_last_byte(weights(target)),
        # Bug caught: a file older than the note counted as unchanged.
        change_while_the_clock_is_back,
        # Bug caught: only files with later times than the note's were read.
        lambda target: (put_the_clock_back(target), flip_last_byte(weights(target))),
        lambda target: weights(target).unlink(),
        lambda target: Path(target, "tokenizer.json").unlink(),
        lambda target: Path(target, "config.json").write_text("{}"),
    ],
)
def test_a_target_that_changed_since_is_named_and_force_makes_it_anew(
    change: Callable[[str], object], command: list[str], capsys: Capture
) -> None:
    intact = contents(Path(command[2]))
    change(command[2])
    assert main(command) == 2
    line = only_line(capsys.readouterr().err)
    assert "was changed or removed since its folder was finished" in line
    assert line.endswith("Give --force to make the folder anew.")
    assert main([*command, "--force", "--quiet"]) == 0
    assert contents(Path(command[2])) == intact


def test_a_copy_of_a_finished_folder_is_read_and_found_finished(
    command: list[str], tmp_path: Path, capsys: Capture
) -> None:
    copy = shutil.copytree(command[2], tmp_path / "copy", copy_function=shutil.copyfile)
    assert main([*command[:2], str(copy)]) == 0
    assert "was finished before" in capsys.readouterr().out
    flip_last_byte(weights(str(copy)))
    assert main([*command[:2], str(copy)]) == 2


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "garbage", "null", '{"version": 1, "task": "%s", "source": 5}']
)
def test_a_damaged_note_and_one_beside_a_journal_prove_nothing(
    content: str, command: list[str], capsys: Capture
) -> None:
    note = Path(command[2]) / FINISHED_FILE
    if content:
        note.write_text(content.replace("%s", f"{command[0]}ion"))
        assert main(command) == 2
        line = only_line(capsys.readouterr().err)
        assert line.startswith(f"vllm-dfloat: {command[2]}: is not empty, and not the beginning")
        assert "give --force" in line
        assert main([*command, "--force", "--quiet"]) == 0
    else:
        (Path(command[2]) / COMPRESS_JOURNAL).touch()
        status = main([*command, "--json"])
        assert status == (0 if command[0] == "compress" else 2)
        if status == 0:
            assert json.loads(capsys.readouterr().out)["was_finished"] is False


def test_verify_inspect_and_plan_take_no_notice_of_the_note(
    command: list[str], capsys: Capture
) -> None:
    note = Path(command[2]) / FINISHED_FILE
    texts = []
    for _ in range(2):
        assert main(["verify", command[2]]) == 0
        assert main(["inspect", command[2]]) == 0
        texts.append(capsys.readouterr().out)
        note.unlink(missing_ok=True)
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "name",
    ["a.safetensors", "model-00001-of-00002.safetensors", "sub/a.pt", "consolidated.safetensors.index.json"],
)  # fmt: skip
def test_weights_or_an_index_that_were_added_since_are_named(
    name: str, command: list[str], capsys: Capture
) -> None:
    # Bug caught: "neither it nor its source has changed since" though there was one more file of weights.
    added = Path(command[2], name)
    added.parent.mkdir(exist_ok=True)
    shutil.copy(weights(command[2]), added)
    assert main(command) == 2
    line = only_line(capsys.readouterr().err)
    assert line.startswith(f"vllm-dfloat: {added}: was added since its folder was finished")
    assert line.endswith("Move it out of the folder.")
    added.unlink()
    assert main(command) == 0


def test_what_was_added_beside_the_model_changes_nothing(command: list[str]) -> None:
    Path(command[2], "README.md").write_text("a model card")
    assert main(command) == 0


def test_a_run_that_has_waited_for_the_same_one_says_that_it_is_finished(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    # Bug caught: of three equal runs at once, those that had waited said "is not empty, ... give --force".
    real, asked = conversion.find_finished, []

    def not_yet(*arguments: object) -> object:
        asked.append(arguments)
        return real(*arguments) if len(asked) > 1 else None

    monkeypatch.setattr(conversion, "find_finished", not_yet)
    before = state(Path(command[2]))
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["was_finished"] is True
    assert (len(asked), state(Path(command[2]))) == (2, before)
    Path(command[2], FINISHED_FILE).unlink()
    assert main(command) == 2
    assert "is not empty" in only_line(capsys.readouterr().err)
