"""How the process of every command ends: ctrl-C, output that nobody reads, a full disk."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli_commands import COMMANDS, make_places, only_line

# Everything is imported once, and each command is a fork that ends as any Python process does, shutdown included.
# Arguments: the kind of ending, a folder for stderr, and the commands as JSON.
_PROGRAM = """
import json, os, resource, signal, sys
from pathlib import Path
import vllm_dfloat.checkpoint.compare, vllm_dfloat.checkpoint.compress, vllm_dfloat.checkpoint.decompress
import vllm_dfloat.checkpoint.summary, vllm_dfloat.plan.plan, vllm_dfloat.plan.report
from vllm_dfloat.cli import main

kind, folder, commands = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])

def interrupt(event, args):
    if event == "open" and isinstance(args[0], (str, os.PathLike)) and sys.argv[1] in str(args[0]):
        os.kill(os.getpid(), signal.SIGINT)

def child(command):
    if kind == "closed pipe":
        reader, out = os.pipe()
        os.close(reader)
    else:
        out = os.open("/dev/full" if kind == "full disk" else os.devnull, os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(os.open(folder / command[0], os.O_CREAT | os.O_WRONLY), 2)
    if kind == "ctrl-C":
        sys.argv = ["vllm-dfloat", command[1]]
        sys.addaudithook(interrupt)
    if kind == "small files":
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    sys.exit(main(command))

ended = {}
for command in commands:
    pid = os.fork()
    if not pid:
        child(command)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    ended[command[0]] = status, (folder / command[0]).read_text()
print(json.dumps(ended))
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_places(tmp_path_factory.mktemp("places"))


def endings(kind: str, places: dict[str, Path], folder: Path) -> dict[str, tuple[int, str]]:
    """Run all commands; return exit status and stderr of each."""
    commands = [
        [argument.format(**places, new=folder / f"new {name}") for argument in COMMANDS[name]]
        for name in COMMANDS
    ]
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, kind, str(folder), json.dumps(commands)],
        env={**os.environ, "VLLM_DFLOAT_THREADS": "1"},  # no thread, which a fork would lose
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {name: tuple(ended) for name, ended in json.loads(done.stdout).items()}


def test_ctrl_c_exits_130_without_a_traceback(places: dict[str, Path], tmp_path: Path) -> None:
    expected = 128 + signal.SIGINT, "vllm-dfloat: interrupted.\n"
    assert endings("ctrl-C", places, tmp_path) == dict.fromkeys(COMMANDS, expected)


def test_output_that_nobody_reads_ends_the_command_silently(
    places: dict[str, Path], tmp_path: Path
) -> None:
    expected = 128 + signal.SIGPIPE, ""
    assert endings("closed pipe", places, tmp_path) == dict.fromkeys(COMMANDS, expected)


def test_a_full_disk_under_the_output_is_one_sentence_and_exits_2(
    places: dict[str, Path], tmp_path: Path
) -> None:
    # Bug caught: exit status 120 and "Exception ignored", or 0.
    expected = 2, f"vllm-dfloat: {os.strerror(errno.ENOSPC)}.\n"
    assert endings("full disk", places, tmp_path) == dict.fromkeys(COMMANDS, expected)


def test_a_limit_on_the_size_of_files_is_one_sentence_and_leaves_no_half_of_one(
    places: dict[str, Path], tmp_path: Path
) -> None:
    ended = endings("small files", places, tmp_path)
    for name in ("compress", "decompress"):
        status, err = ended.pop(name)
        assert status == 2
        assert os.strerror(errno.EFBIG) in only_line(err)
        left = [file for file in (tmp_path / f"new {name}").iterdir() if file.stat().st_size > 0]
        assert [file for file in left if file.name.startswith(".tmp-")] == []
    assert ended == dict.fromkeys(("inspect", "verify", "plan"), (0, ""))
