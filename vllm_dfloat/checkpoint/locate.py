"""The folder that a user means by a path: it may be that of a file in it, of the hub's cache, or of a pipeline."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from vllm_dfloat.checkpoint.folder import CONFIG_FILE, is_dfloat11
from vllm_dfloat.checkpoint.listing import weight_files
from vllm_dfloat.checkpoint.manifest import MANIFEST_FILE
from vllm_dfloat.checkpoint.plain_model import bf16_tensors
from vllm_dfloat.errors import DFloatError, FormatError

PIPELINE_FILE = "model_index.json"  # diffusers: a folder with a folder for each model of it
_HUB_PREFIX = "models--"  # the hub's cache: models--org--name/snapshots/<commit>/, files linked to ../../blobs/
_MAX_DEPTH = (
    4  # levels of folders to look into: enough for a pipeline's models in the cache of all models
)
_MAX_FOLDERS = 1000
_MAX_NAMED = 4

Fits = Callable[[Path], bool]


def check_checkpoint(given: Path) -> None:
    """Refuse a path that is no folder with weight files, and name folders around it that are.

    Raises:
        FormatError: it is none.
        OSError: it cannot be read.
    """
    _check(given, _has_weights, "the folder of a checkpoint")


def check_dfloat11(given: Path) -> None:
    """Refuse a path that is no folder of a DFloat11 checkpoint, as `check_checkpoint` does."""
    _check(
        given,
        lambda path: _has_weights(path) and is_dfloat11(path),
        "the folder of a DFloat11 checkpoint",
    )


def check_bf16(given: Path) -> None:
    """Refuse a path that is no folder of a BF16 model, as `check_checkpoint` does."""
    _check(given, _is_bf16_model, "the folder of a BF16 model")


def check_original(given: Path) -> None:
    """Refuse a path that is neither a folder with weights or a config.json, nor a config.json."""
    if not _is_config_file(given):
        _check(
            given,
            lambda path: _has_weights(path) or _has_config(path),
            "the folder of the BF16 original, or the config.json of it",
        )


def check_config(given: Path) -> None:
    """Refuse a path that is neither a folder with a config.json nor a config.json, as `check_checkpoint` does."""
    if not _is_config_file(given):
        _check(given, _has_config, "the folder of a model, or the config.json of it")


def _is_config_file(given: Path) -> bool:
    is_other = given.name == PIPELINE_FILE or given.name.endswith(".index.json")
    return given.suffix == ".json" and not is_other and given.is_file()


def _has_config(path: Path) -> bool:
    return (path / CONFIG_FILE).is_file()


def _has_weights(path: Path) -> bool:
    return any(file.is_file() for file in weight_files(path))


def _is_bf16_model(path: Path) -> bool:
    if not _has_weights(path) or not _has_config(path) or is_dfloat11(path):
        return False
    return any(t.dtype == "BF16" and len(t.shape) > 1 for t in bf16_tensors(path).values())


def _check(given: Path, fits: Fits, what: str) -> None:
    try:
        is_folder = stat.S_ISDIR(given.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise FormatError(f"{given}: no such folder; expected {what}.") from error
    if not is_folder:
        raise FormatError(f"{given}: is a file; expected {what}. {_of_file(given.parent, fits)}")
    with os.scandir(given):  # raises OSError if it cannot be read
        pass
    around = given
    is_pipeline = (given / PIPELINE_FILE).is_file() and not _has_config(given)
    is_ours = (given / MANIFEST_FILE).is_file() or _safely(is_dfloat11, given)
    if _safely(fits, given) or is_ours or (weight_files(given) and not is_pipeline):
        return  # its reader will say what else is wrong
    if is_pipeline:
        found = f"is a pipeline of several models ({PIPELINE_FILE}), each in a folder of its own"
    elif (hub := _hub_root(given)) in (given.absolute(), given.absolute().parent):
        found = "is of the hub's cache, in which the snapshots are folders of the model"
        around = hub or given
    elif any(_folders(given, fits)):
        found = "holds no *.safetensors file itself"
    else:
        return
    raise FormatError(f"{given}: {found}; expected {what}. {_advice(around, fits)}")


def _hub_root(path: Path) -> Path | None:
    """Return the folder of a model in the hub's cache that is `path` or contains it."""
    for folder in (path.absolute(), *path.absolute().parents):
        if folder.name.startswith(_HUB_PREFIX) and (folder / "snapshots").is_dir():
            return folder
    return None


def _safely(fits: Fits, path: Path) -> bool:
    try:
        return fits(path)
    except (DFloatError, OSError):
        return False


def _of_file(folder: Path, fits: Fits) -> str:
    """Return a sentence about the folder of a file that was given."""
    if _safely(fits, folder):
        return f"Give its folder, {folder}."
    if _has_weights(folder):
        return f"Its folder is {folder}."  # not right either; its reader will say why
    return _advice(_hub_root(folder) or folder, fits)


def _advice(around: Path, fits: Fits) -> str:
    """Return a sentence that names the folders below `around` that fit."""
    named = [str(path) for path in islice(_folders(around, fits), _MAX_NAMED + 1)]
    if not named:
        return f"There is none in {around}: fetch the model again, or give another."
    if len(named) > _MAX_NAMED:
        named[_MAX_NAMED] = f"another in {around}"
    return f"Give {' or '.join(named)}."


def _folders(root: Path, fits: Fits) -> Iterator[Path]:
    """Yield the folders below `root` that fit; in a hub's cache the snapshot of the main branch first."""
    seen = 0
    level = _inside(root)
    for _ in range(_MAX_DEPTH):
        below: list[Path] = []
        for folder in level:
            seen += 1
            if seen > _MAX_FOLDERS:
                return
            if _safely(fits, folder):
                yield folder
            else:
                below += _inside(folder)
        level = below


def _inside(folder: Path) -> list[Path]:
    """Return the visible folders in a folder by name, none if it cannot be read."""
    try:
        with os.scandir(folder) as entries:  # links might lead anywhere
            found = sorted(
                Path(entry)
                for entry in entries
                if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")
            )
        main = (folder.parent / "refs" / "main").read_text() if folder.name == "snapshots" else ""
    except (OSError, ValueError):
        return []
    return sorted(found, key=lambda path: path.name != main.strip())
