"""A folder of safetensors files with a config.json, whatever it holds."""

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vllm_dfloat.checkpoint.listing import (
    model_files,
    refuse_missing_shards,
    visible_files,
    weight_files,
)
from vllm_dfloat.dfloat11.format import FIELDS
from vllm_dfloat.errors import DFloatError, FormatError, UnsupportedError
from vllm_dfloat.storage.json_file import MAX_CONFIG_BYTES, read_object
from vllm_dfloat.storage.safetensors_read import read_header, read_names
from vllm_dfloat.storage.stored_tensor import StoredTensor

COMPRESS_JOURNAL, DECOMPRESS_JOURNAL = (
    ".vllm-dfloat-compress.jsonl",
    ".vllm-dfloat-decompress.jsonl",
)
FINISHED_FILE = ".vllm-dfloat-finished.json"  # for the same command, run again; no part of a model
CONFIG_FILE = "config.json"
CONFIG_KEY = "dfloat11_config"
_UNIT_FIELDS = frozenset(FIELDS) - {"luts", "gaps"}  # other models may name tensors so


def read_config(path: Path) -> dict[str, Any] | None:
    """Return config.json of folder `path`, None if it has none.

    Raises:
        FormatError: it is no JSON object, absurdly large, or no regular file.
    """
    return read_object(path / CONFIG_FILE, MAX_CONFIG_BYTES)


def is_dfloat11(path: Path) -> bool:
    """Return whether the folder holds a DFloat11 checkpoint, of today's or of the legacy layout.

    config.json says so, or the weight files: those for ComfyUI come without a config.json.

    Raises:
        FormatError: config.json is damaged, or a command that writes the folder has not ended.
    """
    refuse_unfinished(path)
    if CONFIG_KEY in (read_config(path) or {}) or visible_files(path, "layer_*.pkl"):
        return True
    try:
        return any(_has_units(file) for file in model_files(path).files)
    except DFloatError:  # the reader of the files will say what is wrong with them
        return False


def _has_units(file: Path) -> bool:
    names, metadata = read_names(file)
    return CONFIG_KEY in metadata or any(is_unit_field(name) for name in names)


def is_unit_field(name: str) -> bool:
    """Return whether only a part of a DFloat11 unit can have this name."""
    return name.rpartition(".")[2] in _UNIT_FIELDS


def refuse_unfinished(path: Path) -> None:
    """Refuse a folder with the journal of a command, which has not finished it.

    Raises:
        FormatError: there is one; the folder holds a part of a model, or a command is still writing it.
    """
    for command, journal in (("compress", COMPRESS_JOURNAL), ("decompress", DECOMPRESS_JOURNAL)):
        if (path / journal).exists():
            raise FormatError(
                f"{path}: unfinished: the {journal} in it says that a {command} into this folder was interrupted or "
                f"is still at work; expected a whole model. Run vllm-dfloat {command} SOURCE "
                f"{shlex.quote(str(path))} again, with the same SOURCE: it goes on where it ended."
            )


def stored_tensors(path: Path, may_be_unfinished: bool = False) -> dict[str, StoredTensor]:
    """Return every tensor of all *.safetensors files in folder `path`, by name.

    Args:
        may_be_unfinished: True for the command that writes the folder and checks what it has written.

    Raises:
        FormatError: no such folder, no safetensors file in it, a damaged file, or a tensor stored twice.
        UnsupportedError: only pickle files.
    """
    if not path.is_dir():
        raise FormatError(f"{path}: no such folder; expected one with *.safetensors files.")
    if not may_be_unfinished:
        refuse_unfinished(path)
    files = weight_files(path)
    if not files:
        if visible_files(path, "*.bin") or visible_files(path, "*.pt"):
            raise UnsupportedError(
                f"{path}: holds PyTorch pickle files only; pickles are never read, since reading can run "
                "code. Convert the model to safetensors."
            )
        raise FormatError(f"{path}: no *.safetensors file; expected at least one.")
    refuse_missing_shards(path, files)
    return _merge(read_header(file) for file in files)


def _merge(headers: Iterable[dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for header in headers:
        for name, tensor in header.items():
            if name in tensors:
                raise FormatError(
                    f"{tensor.where}: the tensor is also in {tensors[name].file.name}; a DFloat11 checkpoint holds "
                    "each once. Files of two checkpoints are mixed here: fetch the one anew into an empty folder."
                )
            tensors[name] = tensor
    return tensors
