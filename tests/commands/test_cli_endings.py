"""How the process of every command ends after ctrl-C, with a closed output pipe and on a full disk."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli_commands import COMMANDS, make_places, only_line

# Everything is imported once. Each command is a fork that ends like any Python process, including its shutdown.
# Arguments: the kinds of ending, each with its commands, as JSON; a folder for stderr.
_PROGRAM = """
import json, os, resource, signal, sys
from pathlib import Path
import vllm_dfloat.checkpoint.verify, vllm_dfloat.convert.compress, vllm_dfloat.convert.decompress
import vllm_dfloat.checkpoint.summary, vllm_dfloat.plan.plan, vllm_dfloat.plan.report
from vllm_dfloat.commands import progress as cli_progress
from vllm_dfloat.cli import main

cli_progress.tells_compiling = False
kinds, folder = json.loads(sys.argv[1]), Path(sys.argv[2])

def interrupt(event, args):
    if event == "open" and isinstance(args[0], (str, os.PathLike)) and sys.argv[0] in str(args[0]):
        os.kill(os.getpid(), signal.SIGINT)

def child(kind, command):
    if kind == "closed pipe":
        reader, out = os.pipe()
        os.close(reader)
    else:
        out = os.open("/dev/full" if kind == "full disk" else os.devnull, os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(os.open(folder / command[0], os.O_CREAT | os.O_WRONLY), 2)
    if kind == "ctrl-C":
        sys.argv = [command[1]]
        sys.addaudithook(interrupt)
    if kind == "small files":
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    if kind == "no streams":
        os.closerange(0, 3)
        sys.stdin = sys.stdout = sys.stderr = None  # as Python starts then
    sys.exit(main(command))

ended = {}
for kind, commands in kinds.items():
    for command in commands:
        pid = os.fork()
        if not pid:
            child(kind, command)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        ended.setdefault(kind, {})[command[0]] = status, (folder / command[0]).read_text()
        (folder / command[0]).unlink()
print(json.dumps(ended))
"""
KINDS = ("ctrl-C", "closed pipe", "full disk", "small files", "no streams")
Endings = dict[str, dict[str, list[int | str]]]  # kind -> command -> exit status and stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("endings")


@pytest.fixture(scope="module")
def endings(folder: Path) -> Endings:
    """Run all commands with all kinds of ending, from one process that imports the package once."""
    places = make_places(folder)
    kinds = {
        kind: [
            [a.format(**places, new=folder / kind / name) for a in COMMANDS[name]]
            for name in COMMANDS
        ]
        for kind in KINDS
    }
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, json.dumps(kinds), str(folder)],
        env={**os.environ, "VLLM_DFLOAT_THREADS": "1"},  # no thread, which a fork would lose
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: Endings = json.loads(done.stdout)
    return found


def test_ctrl_c_exits_130_without_a_traceback(endings: Endings) -> None:
    expected = [128 + signal.SIGINT, "vllm-dfloat: interrupted.\n"]
    assert endings["ctrl-C"] == dict.fromkeys(COMMANDS, expected)


def test_output_that_nobody_reads_ends_the_command_silently(endings: Endings) -> None:
    expected = [128 + signal.SIGPIPE, ""]
    assert endings["closed pipe"] == dict.fromkeys(COMMANDS, expected)


def test_a_full_disk_under_the_output_is_one_sentence_and_exits_2(endings: Endings) -> None:
    # Bug caught: exit status 120 and "Exception ignored", or 0.
    expected = [2, f"vllm-dfloat: standard output: {os.strerror(errno.ENOSPC)}.\n"]
    assert endings["full disk"] == dict.fromkeys(COMMANDS, expected)


def test_a_limit_on_the_size_of_files_is_one_sentence_and_leaves_no_half_of_one(
    endings: Endings, folder: Path
) -> None:
    ended = dict(endings["small files"])
    for name in ("compress", "decompress"):
        status, err = ended.pop(name)
        assert status == 2
        file = folder / "small files" / name / "model"  # which file it is depends on their order
        assert only_line(str(err)).startswith(f"vllm-dfloat: {file}")
        assert only_line(str(err)).endswith(f".safetensors: {os.strerror(errno.EFBIG)}.")
        assert list((folder / "small files" / name).glob(".tmp-*")) == []
    assert ended == {name: [0, ""] for name in ("inspect", "verify", "plan")}


def test_a_command_without_stdin_stdout_and_stderr_does_its_work(
    endings: Endings, folder: Path
) -> None:
    # Bug caught: exit status 1, "different", of verify; compress ended with a traceback, or before it had finished.
    assert endings["no streams"] == {name: [0, ""] for name in COMMANDS}
    made = folder / "no streams" / "compress"
    assert {file.name for file in made.iterdir()} == {
        file.name for file in (folder / "df11").iterdir()
    }
