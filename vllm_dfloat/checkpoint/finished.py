"""A folder that is made already: the same command again compares what it was made from and what is there, cheaply.

A hidden file keeps sizes and times of the source's files, size and SHA-256 of those made from them, and what the
command said. It belongs to this machine, since times do, and is of no use to a reader of the checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_dfloat.checkpoint.folder import FINISHED_FILE
from vllm_dfloat.checkpoint.folder_lock import locked
from vllm_dfloat.checkpoint.json_file import read_object
from vllm_dfloat.checkpoint.manifest import file_entry
from vllm_dfloat.checkpoint.resume import TASKS, Task
from vllm_dfloat.checkpoint.source_files import SourceFiles
from vllm_dfloat.checkpoint.work import Work
from vllm_dfloat.errors import FormatError

_VERSION = 1
_MAX_BYTES = 256 << 20


def write_finished(
    work: Work, task: Task, identity: str, source: SourceFiles, report: Mapping[str, Any]
) -> None:
    """Write down that the folder is finished; it counts when the journal is gone.

    Args:
        work: the folder, with everything in it.
        task: what made it.
        identity: of what it was made from, and how.
        source: the files it was made from.
        report: what `find_finished` is to give back.
    """
    content = {
        "version": _VERSION,
        "task": task.name,
        "identity": identity,
        "source": source.record(),
        "files": dict(work.entries),
        "report": dict(report),
    }
    work.write_text(FINISHED_FILE, json.dumps(content, sort_keys=True) + "\n")


def find_finished(
    target: Path, task: Task, identity: str, source: SourceFiles
) -> Mapping[str, Any] | None:
    """Return the report of the finished folder `target`, None where no such task has finished it.

    Args:
        target: the folder.
        task, identity, source: as for `write_finished`.

    Raises:
        FormatError: it was made from something else, or changed since; or another process is at work in it.
    """
    stamp = target / FINISHED_FILE
    if not stamp.is_file() or _is_begun(target):
        return None
    with locked(target):
        content = read_object(stamp, _MAX_BYTES)
        if _is_begun(target) or content is None:
            return None
        if (content.get("version"), content.get("task")) != (_VERSION, task.name):
            return None
        try:
            _check_source(target, task, identity, source, content)
            _check_target(target, stamp, content["files"])
        except (KeyError, TypeError, ValueError, AttributeError):
            return None  # somebody has written into it
        report: Mapping[str, Any] = content["report"]
        return report


def _is_begun(target: Path) -> bool:
    return any((target / task.journal).exists() for task in TASKS)


def _check_source(
    target: Path, task: Task, identity: str, source: SourceFiles, content: Mapping[str, Any]
) -> None:
    found = source.changed_since(content["source"])
    if found is None and content["identity"] == identity:
        return
    name, what = found or ("", "its options are others")
    raise FormatError(
        f"{source.folder / name}: is not what {target} was made from: {what}; the {task.name} there was finished "
        "before. Give --force to make it anew, or compare the two with verify --against."
    )


def _check_target(target: Path, stamp: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare the sizes of files, and where something has happened to one since, all of its bytes."""
    finished = stamp.stat().st_mtime_ns
    for name, entry in files.items():
        try:
            status = (target / name).stat()
            is_newer = max(status.st_mtime_ns, status.st_ctime_ns) > finished
            same = status.st_size == entry["bytes"] and (
                not is_newer or file_entry(target / name) == entry
            )
        except FileNotFoundError:
            same = False
        if not same:
            raise FormatError(
                f"{target / name}: was changed or removed since its folder was finished; expected {entry['bytes']} "
                f"bytes with the SHA-256 {entry['sha256'][:16]}... Give --force to make the folder anew."
            )
