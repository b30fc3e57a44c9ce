"""The files of a folder that is read for a long time: none of them may change until everything is made from them."""

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
    """Config, indices, weights and side files of a model, as they are when this is made.

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
            FormatError: the weight files cannot be told.
        """
        self.folder = folder
        self._weights = weights
        self._own = self._own_names()
        self.side = side_files(folder, self._own)
        self._snapshot = Snapshot.take(folder, self._names())

    def check(self) -> None:
        """Check that they are still the same, and that there are no others.

        Raises:
            ChangedError: they are not; it names the first.
        """
        known = self._snapshot.files
        found = self._snapshot.difference(known) or self._snapshot.difference(self._names())
        if found:
            name, what = found
            is_beside = name in {*self.side.names, *side_files(self.folder, self._own).names}
            raise changed(self.folder / name, what, _GO_ON if is_beside else _ANEW)

    def identity(self, name: str) -> FileIdentity | None:
        """Return what a file was when this was made."""
        return self._snapshot.files.get(name)

    def record(self) -> dict[str, list[int]]:
        """Return what every file was when this was made, for JSON."""
        return {name: list(astuple(file)) for name, file in sorted(self._snapshot.files.items())}

    def changed_since(self, record: Mapping[str, Sequence[int]]) -> tuple[str, str] | None:
        """Return the first file that is not what it was for `record`, and how it differs in words, or None."""
        before = {name: FileIdentity(*values) for name, values in record.items()}
        return Snapshot(self.folder, before).difference(self._snapshot.files)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Check at the end of the block; a change explains any error in it.

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
