"""Every command through the same table: quiet, debug, help, and how it ends whatever goes wrong."""

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from fuzz_folder import Stored, pack
from helpers import gaussian

from vllm_dfloat.cli import main

CONFIG = Path(__file__).parent / "data" / "configs" / "Llama-3.1-8B.json"
# {bf16} is a model, {df11} the same compressed, {new} a folder that is not there.
COMMANDS = {
    "compress": ["compress", "{bf16}", "{new}"],
    "decompress": ["decompress", "{df11}", "{new}"],
    "inspect": ["inspect", "{df11}"],
    "verify": ["verify", "{df11}", "--against", "{bf16}"],
    "plan": ["plan", "{config}", "--gpu-memory", "24GiB"],
}
BAD_ARGUMENTS = {
    "compress": [["x"], ["x", "y", "z"], ["x", "y", "--workers", "0"], ["x", "y", "--workers", "9" * 5000]],
    "decompress": [["x"], ["x", "y", "--bogus"]],
    "inspect": [[], ["x", "y"]],
    "verify": [[], ["x", "--against"], ["x", "--quiet=1"]],
    "plan": [["x"], ["x", "--gpu-memory", "8GB", "--tp", "1.5"], ["x", "--gpu-memory", "8GB", "--granularity", "a\nb"]],
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Give the folders that the arguments of COMMANDS name."""
    root = tmp_path_factory.mktemp("table")
    bf16 = root / "bf16"
    bf16.mkdir()
    shapes = {"model.layers.0.mlp.up_proj.weight": (64, 48), "model.embed_tokens.weight": (96, 32)}
    tensors = [
        Stored(name, "BF16", list(shape), gaussian(*shape).tobytes())
        for name, shape in shapes.items()
    ]
    (bf16 / "model.safetensors").write_bytes(pack(tensors))
    (bf16 / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
    assert main(["compress", str(bf16), str(root / "df11"), "--quiet"]) == 0
    return {"bf16": bf16, "df11": root / "df11", "config": CONFIG}


@pytest.fixture(params=COMMANDS)
def command(request: pytest.FixtureRequest, places: dict[str, Path], tmp_path: Path) -> list[str]:
    """Give the arguments of each command, with which it succeeds."""
    names = {**places, "new": tmp_path / "new"}
    return [argument.format(**names) for argument in COMMANDS[request.param]]


def with_input(command: list[str], path: Path) -> list[str]:
    """Return a command that reads `path`, and nothing else before it."""
    return [command[0], str(path), *(command[2:] if command[0] != "verify" else ())]


def without_input(command: list[str]) -> list[str]:
    return with_input(command, Path(command[1]).with_name("nowhere"))


def only_line(text: str) -> str:
    (line,) = text.splitlines()
    assert line.isprintable()
    return line


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
    """Run without root's rights, which pass over permissions."""
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
    for folder in (tmp_path, *tmp_path.parents[:2]):
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
    # Bug caught: a traceback, and exit status 1, which says that two checkpoints differ.
    def fail(*_: object) -> None:
        raise KeyError("a\nb")

    monkeypatch.setattr("vllm_dfloat.checkpoint.compare.check", fail)
    assert main(["verify", str(places["df11"])]) == 2
    assert only_line(capsys.readouterr().err).startswith("vllm-dfloat: internal error, KeyError: ")
    monkeypatch.setattr(
        "vllm_dfloat.checkpoint.compare.check", lambda *_: np.zeros(1 << 60, np.uint8)
    )
    assert main(["verify", str(places["df11"])]) == 2
    assert only_line(capsys.readouterr().err).startswith("vllm-dfloat: out of memory")


# In a process of its own: it sends itself ctrl-C when the command opens a file of the model.
_INTERRUPTED = """
import os, signal, sys
from vllm_dfloat.cli import main
def hook(event, args):
    if event == "open" and sys.argv[2] in str(args[0]):
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(hook)
sys.exit(main(sys.argv[1:]))
"""


def run_all(
    places: dict[str, Path],
    folder: Path,
    program: list[str],
    stdout: Callable[[], int],
    names: list[str] | None = None,
) -> dict[str, tuple[int, str]]:
    """Run all commands as processes at the same time; return exit status and stderr of each."""
    started = {}
    for name in names or COMMANDS:
        arguments = [a.format(**places, new=folder / name) for a in COMMANDS[name]]
        out = stdout()
        started[name] = subprocess.Popen(
            [sys.executable, *program, *arguments],
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "VLLM_DFLOAT_THREADS": "1"},
        )
        os.close(out)
    return {name: (p.wait(), p.communicate()[1]) for name, p in started.items()}


def test_ctrl_c_exits_130_without_a_traceback(places: dict[str, Path], tmp_path: Path) -> None:
    ended = run_all(
        places, tmp_path, ["-c", _INTERRUPTED], lambda: os.open(os.devnull, os.O_WRONLY)
    )
    assert ended == dict.fromkeys(COMMANDS, (130, "vllm-dfloat: interrupted.\n"))


def closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def test_output_that_nobody_reads_ends_the_command_silently(
    places: dict[str, Path], tmp_path: Path
) -> None:
    ended = run_all(places, tmp_path, ["-m", "vllm_dfloat.cli"], closed_pipe)
    assert ended == dict.fromkeys(COMMANDS, (128 + signal.SIGPIPE, ""))


def test_a_full_disk_under_the_output_is_one_sentence_and_exits_2(
    places: dict[str, Path], tmp_path: Path
) -> None:
    # Bug caught: exit status 120 and "Exception ignored", or 0.
    ended = run_all(
        places, tmp_path, ["-m", "vllm_dfloat.cli"], lambda: os.open("/dev/full", os.O_WRONLY)
    )
    sentence = f"vllm-dfloat: {os.strerror(errno.ENOSPC)}.\n"
    assert ended == dict.fromkeys(COMMANDS, (2, sentence))


def test_a_limit_on_the_size_of_files_is_one_sentence_and_leaves_no_half_of_one(
    places: dict[str, Path], tmp_path: Path
) -> None:
    pid = os.fork()
    if not pid:
        status = 99
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
            os.dup2(os.open(tmp_path / "err", os.O_CREAT | os.O_WRONLY), 2)
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115  # ends with the process
            status = main(["decompress", str(places["df11"]), str(tmp_path / "new")])
            sys.stderr.flush()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
    assert os.strerror(errno.EFBIG) in only_line((tmp_path / "err").read_text())
    assert not list((tmp_path / "new").glob("*safetensors*"))
