"""The tensors of a model that is not compressed, by name; its files may repeat some."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np

from vllm_dfloat.checkpoint.folder import refuse_unfinished, stored_tensors
from vllm_dfloat.checkpoint.listing import ModelFiles, model_files
from vllm_dfloat.errors import FormatError, shown
from vllm_dfloat.storage.safetensors_read import read_header
from vllm_dfloat.storage.stored_tensor import StoredTensor

_PIECE_BYTES = 16 << 20

Value = TypeVar("Value")


def bf16_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a model that is not compressed, by name.

    If two files hold a tensor with the same bytes, it is taken from the file that the index names.

    Raises:
        FormatError: no such folder, no safetensors in it, or a damaged file. The index names a tensor that is not
            where it says: a part of the model would be missing. Two files hold a tensor with different bytes.
        UnsupportedError: only pickle files.
    """
    refuse_unfinished(path)
    chosen = model_files(path)
    if not chosen.files:
        return stored_tensors(path)  # raises: says what is missing
    tensors = merged(chosen)
    for name, file in chosen.weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise FormatError(
                f"{path / chosen.index}: says that {shown(name)} is in {file}, which does not hold it. "
                "The files belong to different models, or are damaged; fetch them again."
            )
    return tensors


def merged(chosen: ModelFiles) -> dict[str, StoredTensor]:
    """Return every tensor of a model's files, by name.

    Raises:
        FormatError: a damaged file, or one tensor with different bytes in two files.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in chosen.files:
        for name, tensor in read_header(file).items():
            other = tensors.setdefault(name, tensor)
            if other is not tensor:
                refuse_different(tensor, other)
            if chosen.weight_map.get(name) == file.name:
                tensors[name] = tensor
    return tensors


def repeated(tensors: Iterable[StoredTensor]) -> frozenset[str]:
    """Return the names under which several files hold the same tensor.

    Raises:
        FormatError: two hold different ones under one name.
    """
    first: dict[str, StoredTensor] = {}
    found = set()
    for tensor in tensors:
        other = first.setdefault(tensor.name, tensor)
        if other is not tensor:
            refuse_different(tensor, other)
            found.add(tensor.name)
    return frozenset(found)


def each_once(
    pairs: Iterable[tuple[str, Value]], repeated: Collection[str]
) -> Iterator[tuple[str, Value]]:
    """Yield the same pairs, each name once.

    Args:
        pairs: (tensor name, anything).
        repeated: names that may come again, with the same contents.

    Raises:
        FormatError: another name comes again.
    """
    seen: set[str] = set()
    for name, value in pairs:
        if name not in seen:
            seen.add(name)
            yield name, value
        elif name not in repeated:
            raise FormatError(
                f"{shown(name)}: the files of the checkpoint hold two tensors of that name, and whether they are equal "
                "cannot be told here; one is expected. Convert the model to safetensors with one file or an index."
            )


def refuse_different(one: StoredTensor, other: StoredTensor) -> None:
    """Refuse two tensors of one name that are not the same.

    Raises:
        FormatError: their dtypes, shapes or bytes differ.
    """
    if is_same(one, other):
        return
    raise FormatError(
        f"{one.where}: {one.dtype} {list(one.shape)}, and {other.file.name} holds a tensor of that name with other "
        f"contents, {other.dtype} {list(other.shape)}; one is expected, or two that are equal. The two files are of "
        "different versions of the model: fetch both again."
    )


def is_same(one: StoredTensor, other: StoredTensor) -> bool:
    """Return whether two tensors have one dtype, one shape and the same bytes; reads them in pieces."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    left, right = (tensor.bits().reshape(-1).view(np.uint8) for tensor in (one, other))
    return all(
        np.array_equal(left[at : at + _PIECE_BYTES], right[at : at + _PIECE_BYTES])
        for at in range(0, one.num_bytes, _PIECE_BYTES)
    )
