"""What is copied with a model, beside its own weights and its config: tokenizer, licence, layers in other files."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_dfloat.checkpoint.folder import CONFIG_FILE, is_dfloat11
from vllm_dfloat.checkpoint.listing import blobs_of, visible_files, weight_files
from vllm_dfloat.checkpoint.manifest import MANIFEST_FILE, read_manifest
from vllm_dfloat.checkpoint.side_weights import (
    MODULES_FILE,
    is_below,
    is_weights,
    module_folders,
    reasons_to_leave,
)
from vllm_dfloat.errors import DFloatError, FormatError
from vllm_dfloat.storage.lfs import is_pointer, refuse_pointer

_NEEDED = (
    ".json",
    ".model",
    ".txt",
    ".tiktoken",
    ".jinja",
    ".py",
)  # to serve: tokenizers, templates, code


@dataclass(frozen=True)
class SideFiles:
    """The files beside a model's own weights.

    Attributes:
        names: what is copied: paths relative to the folder, in order.
        left_out: path of what is not copied -> why.
    """

    names: tuple[str, ...]
    left_out: Mapping[str, str]

    @property
    def weights(self) -> tuple[str, ...]:
        """Return those of `names` that hold weights."""
        return tuple(name for name in self.names if is_weights(name))


def side_files(folder: Path, own: Collection[str] | None = None) -> SideFiles:
    """Return what is copied with the model in `folder`.

    Hidden files are not copied. Links are followed within the folder, and from a snapshot of a Hugging Face cache to
    the blobs of the same model. Other links are left out: nobody meant to pass on what they lead to.

    Args:
        folder: the model's.
        own: names of the files with its own weights; by default of all weight files directly in the folder.

    Raises:
        FormatError: a file that serving needs is a Git LFS pointer (others are left out), or weights of a layer in
            modules.json would be left out, and vLLM would serve the model without it.
    """
    roots, modules = _roots(folder), module_folders(folder)
    own = {file.name for file in weight_files(folder)} if own is None else set(own)
    own |= {file.name for file in visible_files(folder, "*.safetensors.index.json")}
    listed = _listed(folder)
    _refuse_hidden(folder, modules)
    found = dict(visible_paths(folder))
    files = [name for name, is_folder in found.items() if not is_folder]
    left_out = reasons_to_leave(folder, files, own, listed)
    names = []
    for name, is_folder in found.items():
        if name in own or name in left_out:
            continue
        if is_folder:
            is_layer = any(f"{path}/".startswith(f"{name}/") for path in modules)
        else:
            is_layer = is_weights(name) and is_below(name, modules)
        if not is_folder and (is_layer or name.endswith(_NEEDED)):
            refuse_pointer(folder / name)
        reason = "is a link to a folder" if is_folder else _reason_to_leave(folder / name, roots)
        if reason and is_layer:
            _refuse_weights(folder, name, reason, MODULES_FILE)
        if reason and name in listed and is_weights(name):
            _refuse_weights(folder, name, reason, MANIFEST_FILE)
        if reason:
            left_out[name] = reason
        else:
            names.append(name)
    return SideFiles(tuple(names), {name: left_out[name] for name in found if name in left_out})


def _listed(folder: Path) -> Collection[str]:
    """Return the files that a manifest lists; none without one, or if it is damaged, which its readers report.

    The manifest beside a model that is not compressed is what an earlier checkpoint in its folder has left.
    """
    try:
        manifest = read_manifest(folder)
        is_own = manifest is not None and is_dfloat11(folder)
    except DFloatError:
        return ()
    return manifest.files.keys() if manifest and is_own else ()


def _refuse_weights(folder: Path, name: str, reason: str, named_by: str) -> None:
    raise FormatError(
        f"{folder / name}: {reason}; {named_by} says that a part of the model is there, which vLLM would serve "
        "without its weights. Put a copy of the file there that can be read."
    )


def _refuse_hidden(folder: Path, modules: Collection[str]) -> None:
    for path in sorted(modules):
        if path.startswith(".") and not path.startswith("..") and (folder / path).is_dir():
            raise FormatError(
                f"{folder / path}: is hidden, and {MODULES_FILE} says that a layer of the model is there; hidden files "
                "are not copied. Give the folder a name without a dot, in modules.json too."
            )


def leads_outside(file: Path, folder: Path) -> bool:
    """Return whether a file of `folder` is a link to something outside of its model."""
    return not _is_below(os.path.realpath(file), _roots(folder))


def visible_paths(folder: Path) -> Iterator[tuple[str, bool]]:
    """Yield (path below the folder, whether it is a link to a folder) of all that is not hidden, in order.

    Leaves out config.json and the manifest.

    Raises:
        FormatError: a folder cannot be listed.
    """
    if not folder.is_dir():
        return  # callers say what that means
    for path, folders, files in os.walk(folder, onerror=_refuse_unlisted):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = Path(path).relative_to(folder)
        is_top = below == Path()
        for name in folders:
            if (Path(path) / name).is_symlink():  # os.walk does not follow it
                yield (below / name).as_posix(), True
        for name in sorted(files):
            is_ours = is_top and name in (CONFIG_FILE, MANIFEST_FILE)
            if not is_ours and not name.startswith("."):
                yield (below / name).as_posix(), False


def _refuse_unlisted(error: OSError) -> None:
    raise FormatError(
        f"{error.filename}: cannot be listed ({error.strerror}); vLLM may read files there. Make it readable or move "
        "it away, and run the command again."
    )


def _roots(folder: Path) -> list[str]:
    """Return the folders in which files of the model may lie."""
    real = folder.resolve()
    return [
        str(real),
        *(str(blobs) for place in (real, *real.parents) if (blobs := blobs_of(place))),
    ]


def _reason_to_leave(file: Path, roots: list[str]) -> str:
    """Return why a file is not copied, "" if it is."""
    try:
        target = os.path.realpath(file, strict=True)
        mode = os.stat(target).st_mode
    except OSError as error:
        found = "is a link that leads nowhere" if os.path.islink(file) else "cannot be reached"
        return f"{found} ({error.strerror})"
    if not _is_below(target, roots):
        return f"is a link to {target}, outside of the model's folder"
    if not stat.S_ISREG(mode):
        return "is no regular file"
    return "is a Git LFS pointer, not the file itself" if is_pointer(file) else ""


def _is_below(path: str, roots: list[str]) -> bool:
    return any(path.startswith(root.rstrip("/") + "/") for root in roots)
