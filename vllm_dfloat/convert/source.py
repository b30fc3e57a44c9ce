"""The BF16 model to be compressed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from vllm_dfloat.checkpoint.folder import CONFIG_FILE, CONFIG_KEY, is_dfloat11, read_config
from vllm_dfloat.checkpoint.listing import model_files
from vllm_dfloat.checkpoint.plain_model import bf16_tensors
from vllm_dfloat.checkpoint.quantized import refuse_quantized_config, refuse_quantized_files
from vllm_dfloat.checkpoint.side_files import leads_outside
from vllm_dfloat.convert.source_files import SourceFiles
from vllm_dfloat.errors import FormatError, UnsupportedError
from vllm_dfloat.storage.stored_tensor import StoredTensor, files_of


@dataclass(frozen=True)
class Source:
    """A folder with BF16 weights.

    Attributes:
        path: the folder.
        config: its config.json.
        tensors: everything its weight files hold, by name.
        files: all files it was read from, and those that are copied with it.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    files: SourceFiles

    def identity(self) -> str:
        """Return a digest of the config and of names, sizes, times and headers of the weight files."""
        return identity_of(self.config, self.tensors.values())


def identity_of(config: Mapping[str, Any], tensors: Iterable[StoredTensor]) -> str:
    """Return a digest of a config and of names, sizes, times and headers of the files that hold these tensors."""
    ordered = sorted(tensors, key=lambda tensor: tensor.name)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for file, identity in sorted(files_of(ordered).items()):
        if identity:  # without the inode, which differs between machines and mounts
            of_file = identity.size, identity.mtime_ns, identity.ctime_ns
            digest.update(f"\n{file.name} {of_file}".encode())
    for tensor in ordered:
        digest.update(
            f"\n{tensor.name} {tensor.file.name} {tensor.dtype} {tensor.shape} {tensor.begin}".encode()
        )
    return digest.hexdigest()


def open_source(path: Path) -> Source:
    """Open the BF16 model in folder `path`; reads the config and the headers.

    Raises:
        ChangedError: a file was changed meanwhile.
        FormatError: no such folder, no safetensors or no config.json in it, a damaged file.
        UnsupportedError: the folder holds pickles only, is compressed already, or its weights are quantized.
    """
    if path.is_dir() and is_dfloat11(path):
        _refuse_compressed(path)
    files = SourceFiles(path, lambda folder: model_files(folder).files)
    config = read_config(path)
    refuse_quantized_config(config or {}, f"{path / CONFIG_FILE}")
    tensors = bf16_tensors(path)
    refuse_quantized_files(path, tensors)
    if config is None:
        raise FormatError(
            f"{path}: has no {CONFIG_FILE}; expected one, as Hugging Face models have."
        )
    _check_config_link(path, config)
    files.check()
    return Source(path, config, tensors, files)


def _refuse_compressed(path: Path) -> NoReturn:
    advice = "Give the folder of the BF16 original."
    if CONFIG_KEY in (
        read_config(path) or {}
    ):  # else it may be of a layout that nothing here reads
        advice = "Serve it as it is, or have vllm-dfloat decompress write it back as BF16 first."
    raise UnsupportedError(
        f"{path}: is a DFloat11 checkpoint already; expected BF16 weights. {advice}"
    )


def _check_config_link(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a config.json that is a link to a file elsewhere that is no model's config: it would be copied."""
    is_model = any(key in config for key in ("model_type", "architectures", "_class_name"))
    file = path / CONFIG_FILE
    if not is_model and leads_outside(file, path):
        raise FormatError(
            f"{file}: is a link to {os.path.realpath(file)}, outside of the model's folder, and names no model_type; "
            "expected a model's config. Put a copy of the right one in its place."
        )


def config_text(config: Mapping[str, Any], pattern_dict: Mapping[str, list[str]] | None) -> str:
    """Return a config.json with these patterns as `dfloat11_config`, or without one, in the form of transformers."""
    changed = {key: value for key, value in config.items() if key != CONFIG_KEY}
    is_sorted = list(changed) == sorted(changed)
    if pattern_dict is not None:
        changed[CONFIG_KEY] = {
            "bytes_per_thread": 8,
            "pattern_dict": dict(pattern_dict),
            "threads_per_block": [512],
            # The last release of the official package; the format has not changed since 0.2.0.
            "version": "0.5.0",
        }
    return json.dumps(changed, indent=2, sort_keys=is_sorted) + "\n"
