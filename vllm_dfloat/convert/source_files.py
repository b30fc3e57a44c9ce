"""The files of a source folder: none may change while another folder is made from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path

from vllm_dfloat.checkpoint.folder import CONFIG_FILE
from vllm_dfloat.checkpoint.listing import visible_files
from vllm_dfloat.checkpoint.manifest import MANIFEST_FILE
from vllm_dfloat.checkpoint.side_files import side_files
from vllm_dfloat.storage.file_identity import FileIdentity, Snapshot, changed

_ANEW = "When nothing writes there any more, run the same command again with --force: nothing made from it is used."
_GO_ON = "When nothing writes there any more, run the same command again: what is finished stays."


class SourceFiles:
    """Config, indices, weights and side files of a model, and their identities when this object was made.

    Attributes:
        folder: where they lie.
        side: what is copied, and what is not.
    """

    def __init__(self, folder: Path, weights: Callable[[Path], Iterable[Path]]) -> None:
        """
        Args:
            folder: the model's.
            weights: folder -> its weight files.

        Raises:
            FormatError: the folder's index or shards are not whole.
        """
        self.folder = folder
        self._weights = weights
        self._own = self._own_names()
        self.side = side_files(folder, self._own)
        self._snapshot = Snapshot.take(folder, self._names())

    def check(self) -> None:
        """Check that no file has changed and none was added.

        Raises:
            ChangedError: one has; the message names it.
        """
        known = self._snapshot.files
        found = self._snapshot.difference(known) or self._snapshot.difference(self._names())
        if found:
            name, what = found
            is_beside = name in {*self.side.names, *side_files(self.folder, self._own).names}
            raise changed(self.folder / name, what, _GO_ON if is_beside else _ANEW)

    def identity(self, name: str) -> FileIdentity | None:
        """Return the identity of a file when this object was made."""
        return self._snapshot.files.get(name)

    def record(self) -> dict[str, list[int]]:
        """Return the identity of every file when this object was made, for JSON."""
        return {name: list(astuple(file)) for name, file in sorted(self._snapshot.files.items())}

    def changed_since(self, record: Mapping[str, Sequence[int]]) -> tuple[str, str] | None:
        """Return the first file that differs from `record`, and how, in words; None if none does."""
        before = {name: FileIdentity(*values) for name, values in record.items()}
        return Snapshot(self.folder, before).difference(self._snapshot.files)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Check at the end of the `with` block; a change also explains any error in it.

        Raises:
            ChangedError: a file has changed.
        """
        try:
            yield
        except Exception:
            self.check()
            raise
        self.check()

    def _names(self) -> list[str]:
        indices = visible_files(self.folder, "*.safetensors.index.json")
        files = [*self._weights(self.folder), *indices]
        names = [CONFIG_FILE, MANIFEST_FILE, *(file.name for file in files)]
        return [*names, *side_files(self.folder, self._own_names()).names]

    def _own_names(self) -> list[str]:
        return [file.name for file in self._weights(self.folder)]
