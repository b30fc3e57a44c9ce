"""Several runs into one folder at once: at most one works in it, and a folder called finished is complete."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
from conftest import Checkpoint
from interrupted import contents
from racing import WAS_FINISHED

from vllm_dfloat.checkpoint.verify import compare
from vllm_dfloat.convert.compress import compress
from vllm_dfloat.convert.decompress import decompress
from vllm_dfloat.convert.resume import COMPRESSION, DECOMPRESSION
from vllm_dfloat.convert.source import open_source
from vllm_dfloat.errors import FormatError
from vllm_dfloat.storage import folder_lock
from vllm_dfloat.storage.folder_lock import locked
from vllm_dfloat.storage.journal import discarding, open_journal

SHIPPED = tiny_models.SHIPPED


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "PATIENCE", 0.0)


def test_racing_runs_never_call_finished_what_is_not_whole(
    bf16_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    # Bug caught: --force removed journal and weights of a run that was still working; both exited 0 with mixed files.
    sources = [tiny_models.save("llama", tmp_path / f"s{seed}", seed=seed) for seed in (1, 2)]
    script = Path(__file__).parents[1] / "racing.py"
    command = [sys.executable, str(script), str(tmp_path), "5", "25", *map(str, sources)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert out.returncode == 0, out.stderr
    whole, *rounds = map(json.loads, out.stdout.splitlines())
    assert len(rounds) == 25
    finished = 0
    for round_ in rounds:
        for run in round_["ended"]:
            assert run["status"] in (0, 2, -signal.SIGKILL), run
            if run["status"] == 0:
                finished += 1
                told = [whole[run["source"]]]
                if run["told"] == [WAS_FINISHED]:  # by another run; this one has waited for it
                    assert any(other["told"] == told for other in round_["ended"])
                else:
                    assert run["told"] == told
        if round_["left"] and COMPRESSION.journal not in round_["left"]:
            assert round_["left"] in whole.values()
        assert round_["again"] == whole[str(sources[0])]
    assert finished > 20


def test_a_forced_run_leaves_alone_what_another_run_works_on(
    impatient: None, tmp_path: Path
) -> None:
    # Bug caught: journal and weights removed before the lock was taken.
    target = tmp_path / "t"
    messages = []

    def force_meanwhile(_: int) -> None:
        if not messages:
            before = contents(target)
            for begin in (
                lambda: compress(open_source(SHIPPED), target, force=True),
                lambda: compress(open_source(SHIPPED), target),
                lambda: decompress(tiny_models.official("llama-tiny"), target, force=True),
            ):
                with pytest.raises(FormatError) as error:
                    begin()
                messages.append(str(error.value))
            assert contents(target) == before

    compress(open_source(SHIPPED), target, advance=force_meanwhile)
    assert (
        messages
        == [f"{target}: another process is at work in this folder; wait for it, or choose another."]
        * 3
    )
    compress(open_source(SHIPPED), tmp_path / "alone")
    assert contents(target) == contents(tmp_path / "alone")


def test_a_lock_outlives_everything_in_its_folder_and_leaves_nothing_behind(
    impatient: None, tmp_path: Path
) -> None:
    with locked(tmp_path / "t"):
        (tmp_path / "t/file").write_text("x")
        (tmp_path / "t/file").unlink()
        with pytest.raises(FormatError, match="another process is at work"), locked(tmp_path / "t"):
            pass
    with locked(tmp_path / "t") as lock:
        assert list((tmp_path / "t").iterdir()) == []
        lock.check()


@pytest.mark.parametrize("again", [True, False])
def test_a_locked_folder_that_is_moved_away_is_noticed(again: bool, tmp_path: Path) -> None:
    with locked(tmp_path / "t") as lock:
        (tmp_path / "t").rename(tmp_path / "moved")
        if again:
            with locked(tmp_path / "t") as other:  # another folder, another lock
                other.check()
        with pytest.raises(FormatError, match="was moved, removed or replaced"):
            lock.check()


def test_a_run_whose_folder_is_replaced_ends_in_a_sentence(tmp_path: Path) -> None:
    target = tmp_path / "t"

    def replace(_: int) -> None:
        if target.exists() and list(target.glob("*.safetensors")):
            shutil.move(target, tmp_path / "moved")
            target.mkdir()

    with pytest.raises(FormatError, match="was moved, removed or replaced"):
        compress(open_source(SHIPPED), target, advance=replace)
    assert [path.name for path in target.iterdir() if path.suffix == ".json"] == []


def test_a_journal_that_was_removed_while_it_was_opened_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Bug caught: a lock on a file that has been removed, which excludes no other run.
    file = tmp_path / "journal"
    opened = Path.open

    def open_and_lose(self: Path, *arguments: object, **more: object) -> object:
        stream = opened(self, *arguments, **more)  # type: ignore[arg-type]
        self.unlink()
        return stream

    monkeypatch.setattr(Path, "open", open_and_lose)
    begun = open_journal(file, "task", "source", False, lambda: None)
    with pytest.raises(FormatError, match="another process"), begun:
        pass
    os.close(os.open(file, os.O_CREAT))
    with pytest.raises(FormatError, match="another process"), discarding(file):
        pass


_STOPPING = """
import os, signal, sys
from pathlib import Path
from vllm_dfloat.storage.folder_lock import locked
from vllm_dfloat.convert.worker_pool import run_jobs

def stop(report):
    os.write(1, f"{os.getpid()}\\n".encode())  # in one piece, also with PYTHONUNBUFFERED
    os.kill(os.getpid(), signal.SIGSTOP)

if __name__ == "__main__":
    with locked(Path(sys.argv[1])) as lock:
        list(run_jobs(stop, [(), ()], 2, 1, lambda _: None, lock))
"""


def test_workers_that_outlive_their_parent_keep_its_folder_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Bug caught: the worker of a killed run writes its file into the folder while a later run works there.
    script = tmp_path / "stopping.py"
    script.write_text(_STOPPING)
    command = [sys.executable, str(script), str(tmp_path / "t")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        try:
            workers = [int(parent.stdout.readline()) for _ in range(2)]
        finally:
            parent.kill()
    with monkeypatch.context() as patch:
        patch.setattr(folder_lock, "PATIENCE", 0.0)
        with pytest.raises(FormatError, match="another process"), locked(tmp_path / "t"):
            pass
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    with locked(tmp_path / "t") as lock:
        lock.check()


def test_a_forced_run_that_was_killed_while_it_removed_goes_on_without_force(
    tmp_path: Path,
) -> None:
    # Bug caught: a kill before the journal exists leaves half of the old checkpoint, which looks like a whole one.
    target = tmp_path / "t"
    compress(open_source(SHIPPED), target)
    other = target / "model-of-before.safetensors"
    shutil.copy(SHIPPED / "model.safetensors", other)
    (target / DECOMPRESSION.journal).write_text("")
    removed = Path.unlink

    def unlink(self: Path, missing_ok: bool = False) -> None:
        if self == other:
            raise KeyboardInterrupt
        removed(self, missing_ok)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        with pytest.raises(KeyboardInterrupt):
            compress(open_source(SHIPPED), target, force=True)
    assert other.exists()
    assert (target / COMPRESSION.journal).exists()
    compress(open_source(SHIPPED), target)
    compress(open_source(SHIPPED), tmp_path / "alone")
    assert contents(target) == contents(tmp_path / "alone")


def test_a_folder_with_two_beginnings_is_refused_without_force(tmp_path: Path) -> None:
    target = tmp_path / "t"
    target.mkdir()
    for task in (COMPRESSION, DECOMPRESSION):
        (target / task.journal).write_text("")
    with pytest.raises(FormatError, match="the beginnings of a compression and of a decomp"):
        compress(open_source(SHIPPED), target)
    compress(open_source(SHIPPED), target, force=True)
    assert compare(target, SHIPPED).is_equal
    assert not any((target / task.journal).exists() for task in (COMPRESSION, DECOMPRESSION))


def test_a_file_system_without_locks_is_refused_unless_only_its_files_have_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock

    def of_folders_only(descriptor: object, operation: int) -> None:
        if not isinstance(descriptor, int):
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", of_folders_only)
    compress(open_source(SHIPPED), tmp_path / "t")
    assert compare(tmp_path / "t", SHIPPED).is_equal

    def of_nothing(descriptor: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", of_nothing)
    with pytest.raises(FormatError, match="cannot be locked: No locks available"):
        compress(open_source(SHIPPED), tmp_path / "u")


@pytest.mark.parametrize("line", [b"\xff\xfe\n", b"[1]\n", b"\0\0\n", b'{"file": "model'])
def test_a_damaged_line_of_a_journal_and_what_follows_it_count_as_not_done(
    line: bytes, tmp_path: Path
) -> None:
    # Bug caught: "internal error, UnicodeDecodeError".
    target, whole = tmp_path / "t", tmp_path / "whole"

    def stop(_: int) -> None:
        if len(list(target.glob("model_layers_*.safetensors"))) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(open_source(SHIPPED), target, advance=stop)
    journal = target / COMPRESSION.journal
    head, first, *rest = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(head + first + line + b"".join(rest))
    compress(open_source(SHIPPED), target)
    compress(open_source(SHIPPED), whole)
    assert contents(target) == contents(whole)
