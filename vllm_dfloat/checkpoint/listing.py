"""Which files of a folder hold the weights: from their names and the index, without opening them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vllm_dfloat.errors import FormatError, shown
from vllm_dfloat.storage.json_file import MAX_LIST_BYTES, read_object

INDEX_FILE = "model.safetensors.index.json"
# What transformers and diffusers write. Beside one of these, any other index is that of another copy.
_STANDARD_INDICES = (INDEX_FILE, "diffusion_pytorch_model.safetensors.index.json")
_COPY = "consolidated"  # start of the file names of the second copy that Mistral ships
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True)
class ModelFiles:
    """The files that make up a model.

    Attributes:
        files: in the order of their names.
        index: name of the index that lists them, "" without one.
        weight_map: tensor name -> name of the file that should hold it, from the index.
    """

    files: tuple[Path, ...]
    index: str = ""
    weight_map: Mapping[str, str] = field(default_factory=dict)


def visible_files(folder: Path, pattern: str) -> list[Path]:
    """Return the files directly in a folder whose names match a pattern, by name, without hidden ones.

    macOS writes a ._NAME beside each NAME on foreign disks; such a file is no weight file, config or index.
    """
    return sorted(file for file in folder.glob(pattern) if not file.name.startswith("."))


def blobs_of(folder: Path) -> Path | None:
    """Return the folder with the files of a snapshot in a Hugging Face cache, None for any other folder.

    models--org--name/snapshots/REVISION/ links into models--org--name/blobs/.
    """
    blobs = folder.parent.parent / "blobs"
    is_one = folder.parent.name == "snapshots" and blobs.is_dir() and not blobs.is_symlink()
    return blobs if is_one else None


def weight_files(folder: Path) -> list[Path]:
    """Return all *.safetensors files directly in a folder but hidden ones, by name."""
    return visible_files(folder, "*.safetensors")


def model_files(folder: Path) -> ModelFiles:
    """Return the files of a model that is not compressed: those in its index, or else all weight files.

    As in vLLM: if there is a model.safetensors.index.json, files that it does not list are not read. Mistral's second
    copy of the weights (consolidated*) counts only if it is the only one.

    Raises:
        FormatError: the index is not an index, or names a file that is not there; there are two indices, neither with
            the standard name; or a file is missing from a numbered series.
    """
    files = weight_files(folder)
    named_so = [file for file in files if not file.name.startswith(_COPY)]
    index = _index(folder, has_standard_names=bool(named_so))
    if index is not None:
        weight_map = _weight_map(index, files)
        chosen = tuple(folder / name for name in sorted(set(weight_map.values())))
        return ModelFiles(chosen, index.name, weight_map)
    refuse_missing_shards(folder, named_so or files)
    return ModelFiles(tuple(named_so or files))


def _index(folder: Path, has_standard_names: bool) -> Path | None:
    indices = visible_files(folder, "*.safetensors.index.json")
    for name in _STANDARD_INDICES:
        if folder / name in indices:
            return folder / name
    if has_standard_names:
        indices = [index for index in indices if not index.name.startswith(_COPY)]
    if len(indices) > 1:
        raise FormatError(
            f"{folder}: holds {len(indices)} indices, such as {indices[0].name} and {indices[1].name}, and none is "
            f"{INDEX_FILE}; one is expected. Move those of other models out of the folder."
        )
    return indices[0] if indices else None


def _weight_map(index: Path, files: list[Path]) -> dict[str, str]:
    """Return tensor name -> file name from an index; every file is one of `files`."""
    weight_map = (read_object(index, MAX_LIST_BYTES) or {}).get("weight_map")
    if not isinstance(weight_map, dict):
        raise FormatError(f"{index}: has no object `weight_map`; it is no index of weights.")
    if not weight_map:
        raise FormatError(f"{index}: names no tensor; an index names all. Fetch it again.")
    here = {file.name for file in files}
    for name, file in weight_map.items():
        if not isinstance(file, str) or file not in here:
            raise FormatError(
                f"{index}: says that {shown(name)} is in {shown(file)}, which is no *.safetensors file in "
                f"{index.parent}. The download is incomplete, or the index damaged; fetch it again."
            )
    return weight_map


def refuse_missing_shards(folder: Path, files: list[Path]) -> None:
    """Refuse model-00001-of-00003 without the two others, which no index lists, but the names do.

    Raises:
        FormatError: a numbered series among `files` is not whole.
    """
    series: dict[tuple[str, str], set[int]] = {}
    for file in files:
        if found := _SHARD.fullmatch(file.name):
            stem, number, total = found.groups()
            series.setdefault((stem, total), set()).add(int(number))
    for (stem, total), numbers in series.items():
        missing = next((i for i in range(1, int(total) + 1) if i not in numbers), None)
        if missing is not None:
            raise FormatError(
                f"{folder}: holds {len(numbers)} of {int(total)} files named {stem}-NNNNN-of-{total}.safetensors, "
                f"not {stem}-{missing:05}-of-{total}.safetensors. The model is incomplete: fetch it again, or run "
                "the command again that was writing it."
            )
