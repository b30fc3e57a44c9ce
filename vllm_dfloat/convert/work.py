"""An output folder and the files finished in it so far, under the lock of the run that makes them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_dfloat.checkpoint.manifest import file_entry
from vllm_dfloat.convert.leftovers import COPIES
from vllm_dfloat.errors import FormatError
from vllm_dfloat.storage.file_identity import FileIdentity, identity_of, require_same
from vllm_dfloat.storage.folder_lock import FolderLock
from vllm_dfloat.storage.journal import Journal
from vllm_dfloat.storage.safetensors_write import replacing

_PIECE_BYTES = 1 << 20


class Work:
    """A locked folder and its journal.

    Attributes:
        lock: of the folder; processes that write into it must hold it too.
        entries: name of each finished file -> size and SHA-256, in the form of a manifest.
    """

    def __init__(self, lock: FolderLock, journal: Journal) -> None:
        self.lock = lock
        self.entries: dict[str, dict[str, Any]] = {}
        self._journal = journal
        self._identities: dict[str, FileIdentity] = {}

    @property
    def folder(self) -> Path:
        return self.lock.path

    def resume(self, wanted: set[str]) -> dict[str, Mapping[str, Any]]:
        """Return file name -> journal line of those wanted files that an earlier run has finished, still unchanged."""
        found: dict[str, Mapping[str, Any]] = {}
        for line in self._journal.done:
            name = line.get("file")
            # A file that was made anew has two lines.
            if name not in wanted or name in found or not (self.folder / name).is_file():
                continue
            file = self.folder / name
            identity, entry = identity_of(file), file_entry(file)
            if entry == _entry(line):
                self._add(name, entry, identity)
                found[name] = line
        return found

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a finished file, which has its final name, to the journal.

        Args:
            line: `file`, `num_bytes`, `sha256`, and whatever else the task needs when it is resumed.

        Raises:
            FormatError: the folder was replaced.
        """
        self.lock.check()
        self._refuse_twice(line["file"])
        self._add(line["file"], _entry(line), identity_of(self.folder / line["file"]))
        self._journal.append(dict(line))

    def write_text(self, name: str, text: str) -> None:
        """Write a file that is either complete or absent; it is on the disk when this returns."""
        self._refuse_twice(name)
        file, content = self.folder / name, text.encode()
        with replacing(file) as temporary:
            temporary.write_bytes(content)
        directory = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        self._add(name, entry, identity_of(file))

    def copy(self, source: Path, name: str, identity: FileIdentity | None) -> None:
        """Copy a file; the SHA-256 is made from the bytes that were copied.

        Args:
            source: where it lies.
            name: its path, relative to both folders.
            identity: what it was when it was chosen to be copied.

        Raises:
            ChangedError: it has changed.
            FormatError: it would be written outside of the folder, through a link.
        """
        self._refuse_twice(name)
        file, digest, size = self.folder / name, hashlib.sha256(), 0
        self._journal.append(
            {COPIES: name}
        )  # before: whoever gives this folder up knows whose it is
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.parent.resolve().is_relative_to(self.folder.resolve()):
            raise FormatError(
                f"{file.parent}: is a link out of the folder that is made; expected a folder. Remove the link."
            )
        with (
            replacing(file) as temporary,
            (source / name).open("rb", buffering=0) as stream,
            temporary.open("wb") as out,
        ):
            # Also refuses a file that was replaced by a link to elsewhere.
            require_same(source / name, identity, stream.fileno())
            while piece := stream.read(_PIECE_BYTES):
                digest.update(piece)
                size += out.write(piece)
            require_same(source / name, identity, stream.fileno())
        self._add(name, {"bytes": size, "sha256": digest.hexdigest()}, identity_of(file))

    def check(self) -> None:
        """Check that no finished file has changed.

        Raises:
            FormatError: one has, or the folder was replaced.
        """
        self.lock.check()
        for name, before in self._identities.items():
            try:
                what = before.difference(identity_of(self.folder / name))
            except OSError as error:
                what = f"it cannot be found any more ({error.strerror})"
            if what:
                raise FormatError(
                    f"{self.folder / name}: was changed by another program while its folder was made: {what}. "
                    "Run the same command again: it makes this file anew."
                )

    def _refuse_twice(self, name: str) -> None:
        """Refuse to write a finished file once more: one of the two would be lost, and nothing would show it."""
        if name in self.entries:
            raise RuntimeError(f"{self.folder / name} is finished, and was to be written again")

    def _add(self, name: str, entry: dict[str, Any], identity: FileIdentity) -> None:
        if identity.size != entry["bytes"]:
            raise FormatError(
                f"{self.folder / name}: has {identity.size} bytes, and {entry['bytes']} were written; another program "
                "has changed it. Run the same command again."
            )
        self.entries[name] = entry
        self._identities[name] = identity


def _entry(line: Mapping[str, Any]) -> dict[str, Any]:
    return {"bytes": line["num_bytes"], "sha256": line["sha256"]}
