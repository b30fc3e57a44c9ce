"""The BF16 model that is to be compressed: a folder, or a model of the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_dfloat.checkpoint.folder import CONFIG_FILE, CONFIG_KEY, is_dfloat11, read_config
from vllm_dfloat.checkpoint.manifest import MANIFEST_FILE
from vllm_dfloat.checkpoint.plain_model import bf16_tensors
from vllm_dfloat.checkpoint.quantized import refuse_quantized_config, refuse_quantized_files
from vllm_dfloat.checkpoint.safetensors_file import StoredTensor
from vllm_dfloat.errors import FormatError, UnsupportedError

# Weights in other forms, and what belongs to a download rather than to the model.
_NOT_COPIED = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".h5", ".msgpack",
    ".gguf", ".onnx", ".onnx_data", ".pkl", ".lock", ".incomplete", ".tmp",
)  # fmt: skip
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Source:
    """A folder with BF16 weights.

    Attributes:
        path: the folder.
        config: its config.json.
        tensors: everything its weight files hold, by name.
        others: files to be copied, as paths relative to the folder.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    others: tuple[str, ...]

    def identity(self) -> str:
        """Return a digest of the config and of names, sizes, times and headers of the weight files."""
        return identity_of(self.config, self.tensors.values())


def identity_of(config: Mapping[str, Any], tensors: Iterable[StoredTensor]) -> str:
    """Return a digest of a config and of names, sizes, times and headers of the files that hold these tensors."""
    ordered = sorted(tensors, key=lambda tensor: tensor.name)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for file in sorted({tensor.file for tensor in ordered}):
        status = file.stat()
        digest.update(f"\n{file.name} {status.st_size} {status.st_mtime_ns}".encode())
    for tensor in ordered:
        digest.update(
            f"\n{tensor.name} {tensor.file.name} {tensor.dtype} {tensor.shape} {tensor.begin}".encode()
        )
    return digest.hexdigest()


def open_source(path: Path) -> Source:
    """Open the BF16 model in folder `path`; reads the config and the headers.

    Raises:
        FormatError: no such folder, no safetensors or no config.json in it, a damaged file.
        UnsupportedError: the folder holds pickles only, is compressed already, or its weights are quantized.
    """
    if path.is_dir() and is_dfloat11(path):
        raise UnsupportedError(f"{path}: is a DFloat11 checkpoint already; expected BF16 weights.")
    config = read_config(path)
    refuse_quantized_config(config or {}, f"{path / CONFIG_FILE}")
    tensors = bf16_tensors(path)
    refuse_quantized_files(path, tensors)
    if config is None:
        raise FormatError(
            f"{path}: has no {CONFIG_FILE}; expected one, as Hugging Face models have."
        )
    return Source(path, config, tensors, other_files(path))


def other_files(path: Path) -> tuple[str, ...]:
    """Return what is copied with a model, tokenizer and the like, as paths relative to the folder."""
    found = []
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path)
        hidden = any(part.startswith(".") for part in name.parts)
        is_ours = name.name in (CONFIG_FILE, MANIFEST_FILE) and len(name.parts) == 1
        if file.is_file() and not hidden and not is_ours and not name.name.endswith(_NOT_COPIED):
            found.append(name.as_posix())
    return tuple(found)


def config_text(config: Mapping[str, Any], pattern_dict: Mapping[str, list[str]] | None) -> str:
    """Return config.json with these patterns as `dfloat11_config`, or without one, in the form of transformers."""
    changed = {key: value for key, value in config.items() if key != CONFIG_KEY}
    is_sorted = list(changed) == sorted(changed)
    if pattern_dict is not None:
        changed[CONFIG_KEY] = {
            "bytes_per_thread": 8,
            "pattern_dict": dict(pattern_dict),
            "threads_per_block": [512],
            # The last release of the official package; the format is the same since 0.2.0.
            "version": "0.5.0",
        }
    return json.dumps(changed, indent=2, sort_keys=is_sorted) + "\n"


def local_folder(source: str) -> Path:
    """Return the folder of a model: `source` itself, or a snapshot of the hub's model with that id.

    Raises:
        FormatError: neither a folder nor a model that can be fetched.
    """
    path = Path(source)
    if path.exists() or not _HUB_ID.fullmatch(source):
        return path
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FormatError(
            f"{source}: no such folder; to fetch a model of that id: pip install huggingface_hub."
        ) from None
    try:
        return Path(
            snapshot_download(
                source, ignore_patterns=["*.bin", "*.pth", "*.pt", "*.gguf", "original/*"]
            )
        )
    except Exception as error:  # whatever the network and the library raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise FormatError(
            f"{source}: no such folder, and the model of that id cannot be fetched: {reason} "
            "Give a folder, or try again with a network."
        ) from error
