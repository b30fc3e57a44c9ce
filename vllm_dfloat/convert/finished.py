"""Finished folders: the same command, run again, checks that source and target are unchanged, without reading them.

A hidden file has the sizes and times of the source's files and of those made from them, size and SHA-256 of the latter,
and the report. It is for this machine only, as times are; a reader of the checkpoint does not need it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

from vllm_dfloat.checkpoint.folder import FINISHED_FILE
from vllm_dfloat.checkpoint.manifest import file_entry
from vllm_dfloat.checkpoint.serving_files import changes_answers
from vllm_dfloat.checkpoint.side_files import visible_paths
from vllm_dfloat.convert.leftovers import refuse_leftovers
from vllm_dfloat.convert.resume import TASKS, Task
from vllm_dfloat.convert.source_files import SourceFiles
from vllm_dfloat.convert.work import Work
from vllm_dfloat.errors import FormatError
from vllm_dfloat.storage.file_identity import FileIdentity, Snapshot, identity_of
from vllm_dfloat.storage.folder_lock import locked
from vllm_dfloat.storage.json_file import MAX_LIST_BYTES, read_object

_VERSION = 1


def write_finished(
    work: Work, task: Task, identity: str, source: SourceFiles, report: Mapping[str, Any]
) -> None:
    """Write the file that marks the folder as finished; it counts once the journal is removed.

    Args:
        work: the folder, with everything in it.
        task: what made it.
        identity: of what it was made from, and how.
        source: the files it was made from.
        report: what `find_finished` returns later.

    Raises:
        FormatError: the folder holds another file that a reader would take for a part of the model.
    """
    refuse_leftovers(work.folder, work.entries)
    content = {
        "version": _VERSION,
        "task": task.name,
        "identity": identity,
        "source": source.record(),
        "files": dict(work.entries),
        "identities": _identities(work),
        "report": dict(report),
    }
    work.write_text(FINISHED_FILE, json.dumps(content, sort_keys=True) + "\n")


def _identities(work: Work) -> dict[str, list[int]]:
    made = Snapshot.take(work.folder, work.entries)
    return {name: list(astuple(identity)) for name, identity in made.files.items()}


def find_finished(
    target: Path, task: Task, identity: str, source: SourceFiles
) -> Mapping[str, Any] | None:
    """Return the report of the finished folder `target`, None if no such task has finished it.

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
        try:
            content = read_object(stamp, MAX_LIST_BYTES)
        except FormatError:
            return None  # a damaged file proves nothing
        if _is_begun(target) or content is None:
            return None
        if (content.get("version"), content.get("task")) != (_VERSION, task.name):
            return None
        try:
            _check_source(target, task, identity, source, content)
            _check_target(target, stamp, content["files"], content.get("identities", {}))
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


def _check_target(
    target: Path,
    stamp: Path,
    files: Mapping[str, Mapping[str, Any]],
    identities: Mapping[str, list[int]],
) -> None:
    """Compare every file's size and times, and the bytes of those whose times are others or as new as the note.

    Times must be equal, not only older: a clock that was put back gives a changed file a time before the note's. An
    added file with weights or an index may change what a reader finds; others, such as a README, do not.
    """
    for name, _ in visible_paths(target):
        if name not in files and changes_answers(name):
            raise FormatError(
                f"{target / name}: was added since its folder was finished; expected the {len(files)} files that were "
                "made then. Move it out of the folder."
            )
    finished = stamp.stat().st_mtime_ns
    for name, entry in files.items():
        try:
            now = identity_of(target / name)
            before = FileIdentity(*identities[name]) if name in identities else None
            is_older = max(now.mtime_ns, now.ctime_ns) < finished
            is_untouched = is_older and before is not None and not before.difference(now)
            same = now.size == entry["bytes"] and (
                is_untouched or file_entry(target / name) == entry
            )
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            same = False
        if not same:
            raise FormatError(
                f"{target / name}: was changed or removed since its folder was finished; expected {entry['bytes']} "
                f"bytes with the SHA-256 {entry['sha256'][:16]}... Give --force to make the folder anew."
            )
