"""Weight files beside the model's own: those that vLLM may read, and those that repeat the model's weights.

Sentence-transformers keep layers in folders, BGE-M3 keeps them in files, other models come with adapters. Whatever is
not certainly a copy, or of no use to vLLM, belongs to the model. It is copied byte for byte, and never unpickled.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path, PurePosixPath

from vllm_dfloat.errors import DFloatError
from vllm_dfloat.storage.json_file import read_json
from vllm_dfloat.storage.safetensors_read import read_names

SAFETENSORS = ".safetensors"
_PICKLES = (".bin", ".pt", ".pth")
_INDEX = ".index.json"
_FORMS = (SAFETENSORS, *_PICKLES)
_OTHER_FORMS = (".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data", ".pkl")
_DOWNLOADS = (".lock", ".incomplete", ".tmp")
MODULES_FILE = "modules.json"  # of sentence-transformers: the folders of a model's layers
_MAX_MODULES_BYTES = 1 << 20
_TRAINING = re.compile(r"(optimizer|scheduler|scaler|training_args|rng_state\w*)\.(bin|pt|pth)")
# Names of files that hold all weights of a model in another form.
_COPIES = re.compile(r"(pytorch_model|diffusion_pytorch_model|consolidated)\b.*")
_COPY_FOLDER = "original"  # where Llama's releases have consolidated.*.pth

SECOND_COPY = "holds the model's weights once more"
OTHER_FORM = "is of a form that vLLM does not read beside safetensors"
TRAINING = "is the state of a training, of no use to serve"
DOWNLOAD = "is a part of a download"
NOT_NAMED = "is not named by the model's index, so it is no part of the model"
NOT_THE_INDEX = "is the index of files that are no part of the model"


def is_weights(name: str) -> bool:
    """Return whether a file of this name holds weights that vLLM may read."""
    return name.endswith(_FORMS)


def holds_or_names_weights(name: str) -> bool:
    """Return whether a file of this name holds weights that vLLM may read, or says where such are."""
    return is_weights(name) or name.endswith(_INDEX) or name == MODULES_FILE


def module_folders(folder: Path) -> frozenset[str]:
    """Return the folders that modules.json names, relative to the model's; none if it is missing or damaged."""
    try:
        content = read_json(folder / MODULES_FILE, _MAX_MODULES_BYTES)
    except DFloatError:
        return frozenset()  # vLLM reads nothing from it either
    modules = content.get("modules") if isinstance(content, dict) else content
    paths = [
        module.get("path")
        for module in (modules if isinstance(modules, list) else [])
        if isinstance(module, dict)
    ]
    folders = {posixpath.normpath(path) for path in paths if isinstance(path, str)}
    return frozenset(folders - {"."})


def is_below(name: str, folders: Collection[str]) -> bool:
    """Return whether a file lies in one of these folders, both relative to the model's."""
    return any(parent.as_posix() in folders for parent in PurePosixPath(name).parents)


def reasons_to_leave(
    folder: Path, names: Sequence[str], own: Collection[str], listed: Collection[str]
) -> dict[str, str]:
    """Return file -> why it is not copied, for files with weights and parts of downloads.

    Args:
        folder: the model's.
        names: all files that may be copied, as paths relative to it.
        own: those with the model's own weights and their indices; the result has none of them.
        listed: those that a manifest lists as parts of the model.
    """
    modules = module_folders(folder)
    beside = {_folder(name) for name in names if name.endswith(SAFETENSORS)}
    left: dict[str, str] = {}
    open_ = []
    for name in names:
        if name in own or name in listed:
            continue
        reason = _by_name(name, beside, is_below(name, modules))
        if reason:
            left[name] = reason
        elif name.endswith(_FORMS) and not is_below(name, modules):
            open_.append(name)
    left.update(_copies(folder, open_, own))
    for name in names:  # an index stays with the files that it lists
        of = name.removesuffix(_INDEX)
        if of != name and of.endswith(_FORMS) and name not in (*own, *listed, *left):
            form = PurePosixPath(of).suffix
            same = [n for n in left if _folder(n) == _folder(name) and n.endswith(form)]
            if same or _folder(name) == "":
                left[name] = left[same[0]] if same else NOT_THE_INDEX
    return left


def _by_name(name: str, beside: Collection[str], is_module: bool) -> str:
    """Return why a file is not copied, if its name alone tells; else "".

    Args:
        beside: the folders that hold safetensors.
        is_module: whether modules.json names its folder.
    """
    file = PurePosixPath(name)
    if name.endswith(_DOWNLOADS):
        return DOWNLOAD
    if name.endswith(_OTHER_FORMS):
        return OTHER_FORM
    if _TRAINING.fullmatch(file.name):
        return TRAINING
    if is_module:
        return ""  # vLLM also reads its pickle, if its safetensors hold something else
    of = file.name.removesuffix(_INDEX)
    is_pickle = of.endswith(_PICKLES)
    if is_pickle and _COPIES.fullmatch(of) and _folder(name) in beside:
        return SECOND_COPY
    if not (is_pickle or of.endswith(SAFETENSORS)):
        return ""
    if file.parts[0] == _COPY_FOLDER and len(file.parts) > 1:
        return SECOND_COPY
    if len(file.parts) == 1 and of.endswith(SAFETENSORS):
        return SECOND_COPY if _COPIES.fullmatch(of) else NOT_NAMED
    return ""


def _copies(folder: Path, names: Iterable[str], own: Collection[str]) -> dict[str, str]:
    """Return those of the files that are a second copy of all weights: at least half as large, with the same names."""
    series: dict[str, list[str]] = {}
    for name in names:
        series.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    own_bytes = sum(_size(folder / name) for name in own if name.endswith(SAFETENSORS))
    return {
        name: SECOND_COPY
        for files in series.values()
        if 2 * sum(_size(folder / name) for name in files) >= own_bytes
        and _may_be_the_same(folder, files, own)
        for name in files
    }


def _may_be_the_same(folder: Path, files: Iterable[str], own: Collection[str]) -> bool:
    """Return whether files may hold tensors that the model has; a pickle may, since it is not read."""
    found: set[str] = set()
    for name in files:
        if not name.endswith(SAFETENSORS):
            return True
        found.update(_tensors(folder / name))
    return any(found.intersection(_tensors(folder / n)) for n in own if n.endswith(SAFETENSORS))


def _tensors(file: Path) -> Iterable[str]:
    try:
        return read_names(file)[0]
    except (DFloatError, OSError):
        return ()


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _folder(name: str) -> str:
    return name.rpartition("/")[0]
