"""Compare a checkpoint with its BF16 original, bit for bit."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_dfloat.checkpoint.dfloat11 import open_checkpoint
from vllm_dfloat.checkpoint.folder import is_dfloat11
from vllm_dfloat.checkpoint.manifest import file_differences, read_manifest
from vllm_dfloat.checkpoint.plain_model import bf16_tensors
from vllm_dfloat.checkpoint.weights import typed_weights
from vllm_dfloat.errors import FormatError

Bits = npt.NDArray[Any]


@dataclass
class Comparison:
    """The outcome: how many tensors, bytes and files were compared, and one sentence per difference.

    `files` is None where no manifest says what they should be.
    """

    tensors: int = 0
    num_bytes: int = 0
    files: int | None = None
    differences: list[str] = field(default_factory=list)

    @property
    def is_equal(self) -> bool:
        return not self.differences


def compare(
    path: Path, against: Path, progress: Callable[[str], None] = lambda name: None
) -> Comparison:
    """Compare every tensor of the checkpoint `path` with the tensor of the same name in `against`.

    Args:
        path: a DFloat11 or a plain safetensors folder.
        against: a plain safetensors folder; it also gives the shapes that a DFloat11 folder does not store.
        progress: called with each tensor's name before it is compared.

    Raises:
        FormatError, UnsupportedError: one of the two cannot be read, or `against` is itself compressed.
    """
    if is_dfloat11(against):
        raise FormatError(
            f"{against}: is a DFloat11 checkpoint; --against expects the uncompressed BF16 original."
        )
    originals = bf16_tensors(against)
    result = Comparison()
    seen = set()
    shapes = {
        name.removesuffix(".weight"): tensor.shape
        for name, tensor in originals.items()
        if len(tensor.shape) > 1
    }
    keep_tied = any("lm_head" in name.split(".") for name in originals)
    for name, dtype, bits in _tensors(path, shapes, keep_tied):
        progress(name)
        seen.add(name)
        if name not in originals:
            result.differences.append(f"{name}: not in {against}")
            continue
        original = originals[name]
        result.tensors += 1
        result.num_bytes += bits.nbytes
        difference = _difference(dtype, bits, original.dtype, original.bits())
        if difference:
            result.differences.append(f"{name}: {difference}")
    result.differences += [f"{name}: not in {path}" for name in originals if name not in seen]
    return result


def check(path: Path, progress: Callable[[str], None] = lambda name: None) -> Comparison:
    """Decode everything in `path`, and compare its files with its manifest where it has one.

    Args:
        path: a DFloat11 or a plain safetensors folder.
        progress: called with each tensor's name when it is decoded, and with each file's before it is read.

    Returns:
        What was decoded; its differences are those between files and manifest.

    Raises:
        FormatError, UnsupportedError: the checkpoint or its manifest is damaged; the message names file and tensor.
    """
    result = Comparison()
    manifest = read_manifest(path)
    for name, _, bits in _tensors(path, None, keep_tied=True):
        progress(name)
        result.tensors += 1
        result.num_bytes += bits.nbytes
    if manifest is not None:
        result.files = len(manifest.files)
        result.differences += file_differences(path, manifest, progress)
    return result


def _tensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]] | None, keep_tied: bool = False
) -> Iterator[tuple[str, str, Bits]]:
    if is_dfloat11(path):
        yield from typed_weights(open_checkpoint(path), shapes, keep_tied=keep_tied)
    else:
        for name, tensor in bf16_tensors(path).items():
            yield name, tensor.dtype, tensor.bits()


def _difference(dtype: str, bits: Bits, original_dtype: str, original: Bits) -> str:
    """Return what differs, or nothing."""
    if dtype != original_dtype or bits.shape != original.shape:
        return f"{dtype}{list(bits.shape)} against {original_dtype}{list(original.shape)}"
    left = np.ascontiguousarray(bits).reshape(-1).view(np.uint8)
    right = np.ascontiguousarray(original).reshape(-1).view(np.uint8)
    if np.array_equal(left, right):
        return ""
    size = bits.dtype.itemsize
    wrong = np.flatnonzero((left != right).reshape(-1, size).any(axis=1))
    first = int(wrong[0])
    words = [
        part[first * size : (first + 1) * size][::-1].tobytes().hex() for part in (left, right)
    ]
    return (
        f"{wrong.size} of {bits.size} elements differ, the first at {first}: "
        f"{words[0]} against {words[1]}"
    )
