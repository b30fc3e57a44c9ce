"""Every command in the same table: quiet, debug, help, and the ending after each kind of error."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from cli_commands import COMMANDS, CONFIG, make_places, only_line
from fuzz.folder import Stored, pack

from vllm_dfloat.cli import main

BAD_ARGUMENTS = {
    "compress": [["x"], ["x", "y", "z"], ["x", "y", "--workers", "0"], ["x", "y", "--workers", "9" * 5000]],
    "decompress": [["x"], ["x", "y", "--bogus"]],
    "inspect": [[], ["x", "y"]],
    "verify": [[], ["x", "--against"], ["x", "--quiet=1"]],
    "plan": [["x"], ["x", "--gpu-memory", "8GB", "--tp", "1.5"], ["x", "--gpu-memory", "8GB", "--granularity", "a\nb"]],
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_places(tmp_path_factory.mktemp("places"))


@pytest.fixture(params=COMMANDS)
def command(request: pytest.FixtureRequest, places: dict[str, Path], tmp_path: Path) -> list[str]:
    """Return arguments of each command with which it succeeds."""
    names = {**places, "new": tmp_path / "new"}
    return [argument.format(**names) for argument in COMMANDS[request.param]]


def with_input(command: list[str], path: Path) -> list[str]:
    """Return a command with `path` as its first input."""
    return [command[0], str(path), *(command[2:] if command[0] != "verify" else ())]


def without_input(command: list[str]) -> list[str]:
    return with_input(command, Path(command[1]).with_name("nowhere"))


def test_a_command_that_succeeds_exits_0_with_results_on_stdout_alone(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert out
    assert err == ""


def test_quiet_prints_nothing_and_plan_its_last_line(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == (command[0] == "plan")
    assert err == ""


def test_bad_input_is_one_sentence_and_exits_2_and_debug_shows_the_traceback(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(without_input(command)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    sentence = only_line(err)
    assert sentence.startswith("vllm-dfloat: ")
    assert "nowhere" in sentence
    assert main([*without_input(command), "--debug"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == sentence


@pytest.mark.parametrize("name", COMMANDS)
def test_arguments_that_a_command_does_not_take_are_one_sentence_and_exit_2(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in BAD_ARGUMENTS[name]:
        with pytest.raises(SystemExit) as end:
            main([name, *arguments])
        out, err = capsys.readouterr()
        assert end.value.code == 2
        assert out == ""
        assert only_line(err).startswith("vllm-dfloat")
        assert re.search(r"\. For help: vllm-dfloat( \w+)? -h$", only_line(err))


def test_no_command_and_an_unknown_one_are_one_sentence_and_exit_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for arguments in ([], ["serve"], ["--bogus"]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2
        assert only_line(capsys.readouterr().err).startswith("vllm-dfloat: ")


@pytest.mark.parametrize("name", [*COMMANDS, ""])
def test_help_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([name, "-h"] if name else ["-h"])
    assert end.value.code == 0
    assert f"example: vllm-dfloat {name}" in capsys.readouterr().out


@contextmanager
def as_nobody() -> Iterator[None]:
    """Run without root's rights, because root ignores permissions."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_that_may_not_be_read_is_one_sentence_and_exits_2(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    with as_nobody():
        assert main(with_input(command, closed / "model")) == 2
    assert "closed" in only_line(capsys.readouterr().err)
    closed.chmod(0o700)


def test_a_file_that_may_not_be_read_is_one_sentence_and_exits_2(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "config.json").chmod(0)
    (model / "model.safetensors").write_bytes(pack([]))
    # Several folders if tests run in several processes; pytest denies access to other users.
    for folder in (
        tmp_path,
        *(p for p in tmp_path.parents if p.name.startswith(("pytest", "popen"))),
    ):
        folder.chmod(0o755)
    with as_nobody():
        assert main(with_input(command, model)) == 2
    line = only_line(capsys.readouterr().err)
    assert line.endswith("config.json: cannot be read: Permission denied.")


def test_a_place_that_cannot_be_written_is_one_sentence_and_exits_2(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.png").mkdir()
    for arguments in (
        ["compress", str(places["bf16"]), str(tmp_path / "file")],
        ["compress", str(places["bf16"]), str(tmp_path / "file/inside")],
        ["compress", str(places["bf16"]), "/proc/nowhere/new"],
        ["decompress", str(places["df11"]), str(tmp_path / "file")],
        ["decompress", str(places["df11"]), str(tmp_path / "file/inside")],
        ["decompress", str(places["df11"]), "/proc/nowhere/new"],
        ["plan", str(CONFIG), "--gpu-memory", "24GiB", "--png", str(tmp_path / "folder.png")],
        ["plan", str(CONFIG), "--gpu-memory", "24GiB", "--png", str(tmp_path / "no/a.png")],
    ):
        assert main(arguments) == 2, arguments
        err = capsys.readouterr().err
        assert only_line(err).startswith("vllm-dfloat: ")
        assert "internal error" not in err
    assert (tmp_path / "file").read_text() == "mine"


def test_sizes_that_no_machine_has_are_refused_by_plan(capsys: pytest.CaptureFixture[str]) -> None:
    # Bug caught: OverflowError from a number that float() makes infinite.
    for option in ("--gpu-memory", "--overhead", "--kv-cache-memory"):
        arguments = ["plan", str(CONFIG), "--gpu-memory", "24GiB", option, "9" * 400 + "GiB"]
        assert main(arguments) == 2
        assert only_line(capsys.readouterr().err).startswith(f"vllm-dfloat: {option} 999")


def test_an_error_of_the_package_itself_does_not_look_like_a_difference(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Bug caught: a traceback, and exit status 1, which means that two checkpoints differ.
    def fail(*_: object) -> None:
        raise KeyError("a\nb")

    monkeypatch.setattr("vllm_dfloat.checkpoint.verify.check", fail)
    assert main(["verify", str(places["df11"])]) == 2
    assert only_line(capsys.readouterr().err).startswith("vllm-dfloat: internal error, KeyError: ")
    monkeypatch.setattr(
        "vllm_dfloat.checkpoint.verify.check", lambda *_: np.zeros(1 << 60, np.uint8)
    )
    assert main(["verify", str(places["df11"])]) == 2
    assert only_line(capsys.readouterr().err).startswith("vllm-dfloat: out of memory")


def _without_folder(places: dict[str, Path], root: Path) -> list[str]:
    return ["compress", str(places["bf16"]), "/proc/new"]


def _compressed(places: dict[str, Path], root: Path) -> list[str]:
    return ["compress", str(places["df11"]), str(root / "x")]


def _plain(places: dict[str, Path], root: Path) -> list[str]:
    return ["decompress", str(places["bf16"]), str(root / "x")]


def _float16(places: dict[str, Path], root: Path) -> list[str]:
    (root / "f16").mkdir()
    weight = Stored("model.layers.0.mlp.up_proj.weight", "F16", [8, 8], bytes(128))
    (root / "f16" / "model.safetensors").write_bytes(pack([weight]))
    (root / "f16" / "config.json").write_text("{}")
    return ["compress", str(root / "f16"), str(root / "x")]


@pytest.mark.parametrize(
    ("make", "found", "advice"),
    [
        (
            _without_folder,
            "/proc/new: cannot be made: No such file or directory; expected a place where this user may make a folder",
            "Choose another.",
        ),
        (
            _compressed,
            "is a DFloat11 checkpoint already; expected BF16 weights",
            "Serve it as it is, or have vllm-dfloat decompress write it back as BF16 first.",
        ),
        (
            _plain,
            "found a config.json without dfloat11_config and 1 *.safetensors file(s)",
            "If its weights are BF16 already, use it as it is; if not, fetch the checkpoint again.",
        ),
        (
            _float16,
            "holds no BF16 weight of a linear or embedding layer, but F16; expected some",
            "--dtype bfloat16 --quantization dfloat11.",
        ),
    ],
)
def test_a_folder_of_another_kind_is_refused_with_what_to_do(
    make: Callable[[dict[str, Path], Path], list[str]],
    found: str,
    advice: str,
    places: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(make(places, tmp_path)) == 2
    line = only_line(capsys.readouterr().err)
    assert found in line
    assert line.endswith(advice)


def test_a_path_cannot_forge_a_line_of_any_output(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Bug caught: the last line of a success, with the target's name as it is.
    bf16, df11, alone = (
        tmp_path / f"{kind}\n\x1b[1mvllm-dfloat: all is well" for kind in ("b", "d", "c")
    )
    alone.mkdir()
    (alone / "config.json").write_bytes(CONFIG.read_bytes())
    commands = [
        ["compress", str(places["bf16"]), str(df11)],
        ["compress", str(places["bf16"]), str(df11)],  # is finished
        ["decompress", str(df11), str(bf16)],
        ["inspect", str(df11)],
        ["inspect", str(bf16)],
        ["verify", str(df11)],
        ["verify", str(df11), "--against", str(bf16)],
        ["plan", str(alone), "--gpu-memory", "24GiB"],
        ["plan", str(alone), "--gpu-memory", "24GiB", "--layout", "all"],
        ["compress", str(df11), str(bf16)],  # an error
    ]
    for command in commands:
        status = main(command)
        out, err = capsys.readouterr()
        assert status == (2 if command is commands[-1] else 0), err
        said = (out or err).splitlines()
        assert all(line.isprintable() for line in said)
        assert not any(line.startswith("vllm-dfloat: all is well") for line in said)
        assert any(r"\n\x1b[1mvllm-dfloat: all is well" in line for line in said)


@pytest.mark.parametrize(
    "arguments",
    [
        ["compress", "", "x"],
        ["compress", "x", ""],
        ["decompress", "", "x"],
        ["decompress", "x", "y", "--original", ""],
        ["inspect", ""],
        ["verify", ""],
        ["verify", "x", "--against", ""],
        ["plan", "", "--gpu-memory", "24GiB"],
        ["plan", "x", "--gpu-memory", "24GiB", "--png", ""],
    ],
)
def test_an_empty_path_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    # Bug caught: the current folder, where a variable of a script was not set.
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    line = only_line(capsys.readouterr().err)
    assert "is empty; expected a path, with . for the current folder" in line
