"""What lies in a folder in which a model is to be made: files of earlier runs, which are removed, and those of others.

What earlier runs made or copied is listed: by the manifest or the note of a finished one, by the journal of an
interrupted one. Nothing else is removed but weights and their indices, with --force. Files of others that would change
the model are refused, before anything is touched.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from vllm_dfloat.checkpoint.folder import (
    COMPRESS_JOURNAL,
    CONFIG_FILE,
    DECOMPRESS_JOURNAL,
    FINISHED_FILE,
)
from vllm_dfloat.checkpoint.listing import visible_files
from vllm_dfloat.checkpoint.manifest import MANIFEST_FILE
from vllm_dfloat.checkpoint.serving_files import changes_answers
from vllm_dfloat.checkpoint.side_files import visible_paths
from vllm_dfloat.errors import FormatError, one_line
from vllm_dfloat.storage.journal import discarding, read_lines
from vllm_dfloat.storage.json_file import MAX_LIST_BYTES, read_object

COPIES = "copies"  # key of a line of the journal: the name of a file that is about to be copied
_JOURNALS = (COMPRESS_JOURNAL, DECOMPRESS_JOURNAL)
_CHECKPOINT_FILES = ("*.safetensors", "*.safetensors.index.json", MANIFEST_FILE)
_MADE_ALWAYS = frozenset({CONFIG_FILE, MANIFEST_FILE, FINISHED_FILE, *_JOURNALS})
_MAX_NAMED = 3


def refuse_leftovers(folder: Path, made: Collection[str], is_replaced: bool = False) -> None:
    """Refuse a folder with other files than those made there, if a reader would take them for a part of the model.

    Args:
        folder: where a model is made.
        made: the files of it, and those that will be removed, relative to the folder.
        is_replaced: the weights directly in the folder and their indices will be removed too.

    Raises:
        FormatError: there is one; the message names it.
    """
    found = [
        name
        for name, _ in visible_paths(folder)
        if name not in made and changes_answers(name) and not (is_replaced and _is_replaced(name))
    ]
    if found:
        others = [one_line(name) for name in found[1:]]
        are = "are" if len(others) > 1 else "is"
        more = f", and so {are} {', '.join(others[:_MAX_NAMED])}" if others else ""
        more += f" and {len(others) - _MAX_NAMED} more" if len(others) > _MAX_NAMED else ""
        what = "them" if others else "it"
        raise FormatError(
            f"{folder / found[0]}: is no part of the model that was made here, and would change it{more}; an earlier "
            f"run or another program has left {what}. Move {what} out of the folder, and run the same command again."
        )


def _is_replaced(name: str) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in _CHECKPOINT_FILES)


def refuse_other_kinds(folder: Path, names: Collection[str]) -> None:
    """Refuse a folder in which a folder has the place of a file to be made, or a file that of a folder.

    Args:
        folder: where a model is made.
        names: the files that will be made in it or replaced, relative to it.

    Raises:
        FormatError: there is one; the message names it.
    """
    files = {*names, *_MADE_ALWAYS}
    for pattern in _CHECKPOINT_FILES:
        files.update(file.name for file in visible_files(folder, pattern))
    for name in sorted(files):
        for parent in reversed(PurePosixPath(name).parents[:-1]):
            place = folder / parent
            if (place.exists() or place.is_symlink()) and not place.is_dir():
                _refuse_kind(place, "is no folder", f"a folder, for {one_line(name)}")
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            _refuse_kind(folder / name, "is a folder", "a file, which is made here")
    for name in _JOURNALS:
        if (folder / name).is_symlink():
            _refuse_kind(folder / name, "is a link", "a file, which is made here")


def _refuse_kind(place: Path, found: str, expected: str) -> None:
    raise FormatError(
        f"{place}: {found}; expected {expected}. Move it out of the folder, and run the same command again."
    )


def made_before(folder: Path) -> set[str]:
    """Return the files that earlier runs made or copied, relative to the folder; damaged lists are ignored."""
    names: set[str] = set()
    for file in (MANIFEST_FILE, FINISHED_FILE):
        try:
            content = read_object(folder / file, MAX_LIST_BYTES) or {}
        except FormatError:
            continue
        listed = content.get("files")
        names.update(name for name in (listed if isinstance(listed, dict) else ()))
    for journal in _JOURNALS:
        lines = read_lines(folder / journal)
        names.update(name for line in lines if isinstance(name := line.get(COPIES), str))
    return names - _MADE_ALWAYS


def remove_old_copies(folder: Path, keep: Collection[str]) -> None:
    """Remove what an interrupted run of the same task has copied, if the source has it no more."""
    _remove(folder, made_before(folder) - set(keep))


def clear(folder: Path, journal: str) -> None:
    """Remove the checkpoint in a folder with all files made with it, and the journals of other tasks.

    Args:
        folder: where a model is made.
        journal: that of the task that makes it.
    """
    with ExitStack() as journals:
        made = made_before(folder)
        for other in _JOURNALS:
            if other != journal:
                journals.enter_context(discarding(folder / other))
        _remove(folder, {*made, CONFIG_FILE} if made else made)
    # The lists of files go after the files: if this run is killed, the next one still finds them.
    for pattern in _CHECKPOINT_FILES:
        for file in visible_files(folder, pattern):
            file.unlink()
    (folder / FINISHED_FILE).unlink(missing_ok=True)


def _remove(folder: Path, names: Collection[str]) -> None:
    for name in names:
        file = folder / name
        is_inside = file.parent.resolve().is_relative_to(folder.resolve())
        if is_inside and (file.is_file() or file.is_symlink()):
            file.unlink()
