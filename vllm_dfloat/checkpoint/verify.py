"""Compare a checkpoint with its BF16 original, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vllm_dfloat.checkpoint.differences import difference, embeddings, lone_head_difference
from vllm_dfloat.checkpoint.folder import is_dfloat11, read_config
from vllm_dfloat.checkpoint.listing import model_files, weight_files
from vllm_dfloat.checkpoint.manifest import file_differences, file_entry
from vllm_dfloat.checkpoint.model_class import refuse_missing_parameters
from vllm_dfloat.checkpoint.plain_model import bf16_tensors
from vllm_dfloat.checkpoint.reader import Dfloat11Checkpoint, open_checkpoint
from vllm_dfloat.checkpoint.serving_files import served_differences
from vllm_dfloat.checkpoint.shapes import Shapes
from vllm_dfloat.checkpoint.side_files import side_files
from vllm_dfloat.checkpoint.tied import is_lm_head, ties_embeddings
from vllm_dfloat.checkpoint.weights import typed_weights
from vllm_dfloat.codec.arrays import Bits
from vllm_dfloat.errors import FormatError
from vllm_dfloat.storage.progress import Advance, Bytes, Start, ignore, no_start
from vllm_dfloat.storage.stored_tensor import StoredTensor


@dataclass
class Comparison:
    """The outcome: how many tensors, bytes and files were compared, and one sentence per difference.

    `files` counts the files compared with the manifest, or with an original the weight files beside the model's own;
    None if there are none. `not_sought` says why it could not be checked whether tensors are missing, "" if it was.
    `is_compressed` is True for a DFloat11 checkpoint. `served` has a sentence per file that vLLM reads beside the
    weights and that is not alike in the two folders; these are no differences.
    """

    tensors: int = 0
    num_bytes: int = 0
    files: int | None = None
    not_sought: str = ""
    is_compressed: bool = True
    differences: list[str] = field(default_factory=list)
    served: list[str] = field(default_factory=list)

    @property
    def is_equal(self) -> bool:
        return not self.differences


def compare(
    path: Path, against: Path, start: Start = no_start, advance: Advance = ignore
) -> Comparison:
    """Compare every tensor of the checkpoint `path` with the tensor of the same name in `against`.

    Also compares the bytes of other weight files, beside the model's own (side_weights.py). Nothing else decides;
    other files that vLLM reads are named where they are not alike, since users edit them.
    An LM head that only one of the two has is no difference if config.json of `path` ties it to the embedding, and it
    is that to the bit.

    Args:
        path: a DFloat11 or a plain safetensors folder.
        against: a plain safetensors folder; it also gives the shapes that a DFloat11 folder without a manifest does not
            store.
        start: called with the bytes to be compared in all.
        advance: called with the bytes that were compared since, all of them by the end.

    Raises:
        FormatError, UnsupportedError: one of the two cannot be read, or `against` is itself compressed.
    """
    if is_dfloat11(against):
        raise FormatError(
            f"{against}: is a DFloat11 checkpoint; --against expects the uncompressed BF16 original."
        )
    originals = bf16_tensors(against)
    opened = _open(path, originals)
    beside = _weights_beside(against), _weights_beside(path)
    num_bytes = opened.num_bytes + sum(file.stat().st_size for file in beside[1].values())
    progress = Bytes(num_bytes, advance)
    start(num_bytes, 0)
    result = Comparison()
    _compare_tensors(result, opened, originals, (against, path), progress.done)
    names = sorted(beside[0].keys() | beside[1].keys())
    result.files = len(names) or None
    for name in names:
        files = [place.get(name) for place in beside]
        result.differences += _file_differences(name, files, (against, path), progress.done)
    result.served = served_differences(path, against)
    progress.finish()
    return result


def _compare_tensors(
    result: Comparison,
    opened: _Opened,
    originals: Mapping[str, StoredTensor],
    folders: Sequence[Path],
    advance: Advance,
) -> None:
    """Compare the tensors of a checkpoint with the originals, and add what was found to `result`."""
    against, path = folders
    seen = set()
    for name, dtype, bits in opened.tensors:
        seen.add(name)
        advance(bits.nbytes)
        if name in originals:
            what = difference(dtype, bits, originals[name])
        elif opened.is_tied and is_lm_head(name):
            what = lone_head_difference(dtype, bits, originals, against)
        else:
            result.differences.append(f"{name}: not in {against}")
            continue
        result.tensors += 1
        result.num_bytes += bits.nbytes
        if what:
            result.differences.append(f"{name}: {what}")
    for name in (name for name in originals if name not in seen):
        what = f"not in {path}"
        if opened.is_tied and is_lm_head(name):
            dtype, bits = originals[name].dtype, originals[name].read()
            what = lone_head_difference(dtype, bits, originals, path)
        if what:
            result.differences.append(f"{name}: {what}")


def _weights_beside(path: Path) -> dict[str, Path]:
    """Return the files of a model that hold weights beside its own, by their path below its folder."""
    own = weight_files(path) if is_dfloat11(path) else model_files(path).files
    return {name: path / name for name in side_files(path, [file.name for file in own]).weights}


def _file_differences(
    name: str, files: Sequence[Path | None], folders: Sequence[Path], advance: Advance
) -> list[str]:
    """Return a sentence if an original file and the one of a checkpoint differ, or one of them is missing."""
    original, file = files
    if original is None or file is None:
        return [f"{name}: not in {folders[original is not None]}"]
    entry, expected = file_entry(file, advance), file_entry(original)
    if entry == expected:
        return []
    what = "bytes" if entry["bytes"] != expected["bytes"] else "sha256"
    return [f"{name}: {what} {entry[what]} against {expected[what]}"]


def check(path: Path, start: Start = no_start, advance: Advance = ignore) -> Comparison:
    """Decode everything in `path`, and compare its files with its manifest where it has one.

    Args:
        path: a DFloat11 or a plain safetensors folder.
        start: called with the bytes to be decoded and those of the manifest's files.
        advance: called with the bytes that were decoded or read since, all of them by the end.

    Returns:
        What was decoded; its differences are those between files and manifest.

    Raises:
        FormatError, UnsupportedError: the checkpoint or its manifest is damaged; the message names file and tensor.
    """
    result = Comparison()
    opened = _open(path, None)
    num_bytes, checkpoint = opened.num_bytes, opened.checkpoint
    result.is_compressed = checkpoint is not None
    manifest = checkpoint.manifest if checkpoint else None  # beside a plain model it is not its own
    if manifest is None:
        result.not_sought = refuse_missing_parameters(path, opened.names, path)
    else:
        num_bytes += sum(entry["bytes"] for entry in manifest.files.values())
    progress = Bytes(num_bytes, advance)
    start(num_bytes, 0)
    for _, _, bits in opened.tensors:
        result.tensors += 1
        result.num_bytes += bits.nbytes
        progress.done(bits.nbytes)
    if manifest is not None:
        result.files = len(manifest.files)
        result.differences += file_differences(path, manifest, progress.done)
    progress.finish()
    return result


@dataclass(frozen=True)
class _Opened:
    """A checkpoint to be decoded.

    Attributes:
        num_bytes: what its tensors take when they are decoded.
        tensors: name, dtype and bits of each.
        names: of all its tensors, as far as they are known before that.
        checkpoint: None for a plain one.
        is_tied: whether config.json says that the LM head is the embedding.
    """

    num_bytes: int
    tensors: Iterator[tuple[str, str, Bits]]
    names: Collection[str]
    checkpoint: Dfloat11Checkpoint | None = None
    is_tied: bool = False


def _open(path: Path, originals: Mapping[str, StoredTensor] | None) -> _Opened:
    """Open a checkpoint to compare it with `originals`, or, if that is None, to decode it; then it must be whole."""
    if not is_dfloat11(path):
        stored = bf16_tensors(path)
        config = read_config(path)
        if originals is None and config is None:
            raise FormatError(
                f"{path}: has no config.json, so nothing says whether all of a model is here; expected one. Fetch it, "
                "run the command again that was writing this folder, or compare with the original: --against."
            )
        # Nothing looks at them if there is no original: then they are only mapped.
        load = StoredTensor.bits if originals is None else StoredTensor.read
        tensors = ((name, tensor.dtype, load(tensor)) for name, tensor in stored.items())
        num_bytes = sum(tensor.num_bytes for tensor in stored.values())
        return _Opened(num_bytes, tensors, stored, None, bool(ties_embeddings(config or {})))
    checkpoint = open_checkpoint(path)
    num_bytes = sum(2 * unit.num_weights for unit in checkpoint.units.values())
    num_bytes += sum(tensor.num_bytes for tensor in checkpoint.plain.values())
    is_tied = bool(ties_embeddings(checkpoint.config))
    shapes = _shapes(checkpoint, originals, is_tied)
    decoded = typed_weights(checkpoint, shapes)
    return _Opened(num_bytes, decoded, checkpoint.names, checkpoint, is_tied)


def _shapes(
    checkpoint: Dfloat11Checkpoint, originals: Mapping[str, StoredTensor] | None, is_tied: bool
) -> Shapes | None:
    """Return the shapes that the manifest says, as for vLLM and decompress; others from the originals."""
    manifest = checkpoint.manifest
    if originals is None:
        return manifest.module_shapes if manifest else None
    shapes = {
        name.removesuffix(".weight"): tensor.shape
        for name, tensor in originals.items()
        if len(tensor.shape) > 1
    }
    if manifest:
        return shapes | manifest.module_shapes
    for unit in checkpoint.units.values() if is_tied else ():
        if len(unit.names) == 1 and is_lm_head(unit.name):
            sizes = (tensor.shape for tensor in embeddings(originals).values())
            fits = (shape for shape in sizes if math.prod(shape) == unit.num_weights)
            shapes.setdefault(unit.name, next(fits, (1, unit.num_weights)))
    return shapes
