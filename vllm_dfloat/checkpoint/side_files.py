"""What is copied with a model beside its weights and its config: tokenizer, licence, templates and the like."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_dfloat.checkpoint.folder import CONFIG_FILE
from vllm_dfloat.checkpoint.lfs import is_pointer, refuse_pointer
from vllm_dfloat.checkpoint.manifest import MANIFEST_FILE

# Weights in other forms, and what belongs to a download rather than to the model.
_NOT_COPIED = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".h5", ".msgpack",
    ".gguf", ".onnx", ".onnx_data", ".pkl", ".lock", ".incomplete", ".tmp",
)  # fmt: skip

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
    """The files beside the weights.

    Attributes:
        names: what is copied, as paths relative to the folder, in their order.
        left_out: what is not, likewise -> why.
    """

    names: tuple[str, ...]
    left_out: Mapping[str, str]


def side_files(folder: Path) -> SideFiles:
    """Return what is copied with the model in `folder`.

    Hidden files are not. Links are followed within the folder, and from a snapshot of a Hugging Face cache to the blobs
    of the same model; what any other link leads to is left out: it was never meant to be passed on.

    Raises:
        FormatError: a file that serving needs is a Git LFS pointer; another one is left out.
    """
    roots = _roots(folder)
    names, left_out = [], {}
    for name, is_folder in _walk(folder):
        if not is_folder and name.endswith(_NEEDED):
            refuse_pointer(folder / name)
        reason = "is a link to a folder" if is_folder else _reason_to_leave(folder / name, roots)
        if reason:
            left_out[name] = reason
        else:
            names.append(name)
    return SideFiles(tuple(names), left_out)


def leads_outside(file: Path, folder: Path) -> bool:
    """Return whether a file of `folder` is a link to what does not belong to the model in it."""
    return not _is_below(os.path.realpath(file), _roots(folder))


def _walk(folder: Path) -> Iterator[tuple[str, bool]]:
    """Yield (path relative to the folder, whether it is a link to a folder) of all that may be copied, in order."""
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = Path(path).relative_to(folder)
        is_top = below == Path()
        for name in folders:
            if (Path(path) / name).is_symlink():  # which os.walk does not follow
                yield (below / name).as_posix(), True
        for name in sorted(files):
            is_ours = is_top and name in (CONFIG_FILE, MANIFEST_FILE)
            if not is_ours and not name.startswith(".") and not name.endswith(_NOT_COPIED):
                yield (below / name).as_posix(), False


def _roots(folder: Path) -> list[str]:
    """Return where files of the model may lie."""
    real = folder.resolve()
    roots = [str(real)]
    for place in (real, *real.parents):
        # models--org--name/snapshots/REVISION/, whose files are links into models--org--name/blobs/
        blobs = place.parent.parent / "blobs"
        if place.parent.name == "snapshots" and blobs.is_dir() and not blobs.is_symlink():
            roots.append(str(blobs))
    return roots


def _reason_to_leave(file: Path, roots: list[str]) -> str:
    """Return why a file is not copied, nothing if it is."""
    try:
        target = os.path.realpath(file, strict=True)
        mode = os.stat(target).st_mode
    except OSError as error:
        return f"is a link that leads nowhere ({error.strerror})"
    if not _is_below(target, roots):
        return f"is a link to {target}, outside of the model's folder"
    if not stat.S_ISREG(mode):
        return "is no regular file"
    return "is a Git LFS pointer, not the file itself" if is_pointer(file) else ""


def _is_below(path: str, roots: list[str]) -> bool:
    return any(path.startswith(root.rstrip("/") + "/") for root in roots)
