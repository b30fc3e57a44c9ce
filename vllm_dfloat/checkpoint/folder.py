"""A folder of safetensors files with a config.json, whatever it holds."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vllm_dfloat.checkpoint.json_file import read_object
from vllm_dfloat.checkpoint.safetensors_file import StoredTensor, read_header
from vllm_dfloat.errors import FormatError, UnsupportedError

CONFIG_FILE = "config.json"
CONFIG_KEY = "dfloat11_config"
MAX_CONFIG_BYTES = 16 << 20


def read_config(path: Path) -> dict[str, Any] | None:
    """Return config.json of folder `path`, None if it has none.

    Raises:
        FormatError: it is no JSON object, absurdly large, or no regular file.
    """
    return read_object(path / CONFIG_FILE, MAX_CONFIG_BYTES)


def is_dfloat11(path: Path) -> bool:
    """Return whether the folder holds an official DFloat11 checkpoint, of today's or of the legacy layout."""
    return CONFIG_KEY in (read_config(path) or {}) or any(path.glob("layer_*.pkl"))


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return every tensor of all *.safetensors files in folder `path`, by name.

    Raises:
        FormatError: no such folder, no safetensors file in it, a damaged file, or a tensor stored twice.
        UnsupportedError: only pickle files.
    """
    if not path.is_dir():
        raise FormatError(f"{path}: no such folder; expected one with *.safetensors files.")
    files = sorted(path.glob("*.safetensors"))
    if not files:
        if any(path.glob("*.bin")) or any(path.glob("*.pt")):
            raise UnsupportedError(
                f"{path}: holds PyTorch pickle files only; pickles are never read, since reading can run "
                "code. Convert the model to safetensors."
            )
        raise FormatError(f"{path}: no *.safetensors file; expected at least one.")
    return tensors_of(files)


def tensors_of(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Return every tensor of some safetensors files, by name.

    Raises:
        FormatError: a damaged file, or a tensor stored twice.
    """
    return _merge(read_header(file) for file in files)


def _merge(headers: Iterable[dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for header in headers:
        for name, tensor in header.items():
            if name in tensors:
                raise FormatError(
                    f"{tensor.where}: the tensor is also in {tensors[name].file.name}; one file is "
                    "expected to hold it. Remove the file that does not belong here."
                )
            tensors[name] = tensor
    return tensors
