"""Whether a compressed model can be read: its names are checked before it is written, and it is opened afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vllm_dfloat.checkpoint.members import plan
from vllm_dfloat.checkpoint.reader import open_checkpoint
from vllm_dfloat.dfloat11.format import FIELDS
from vllm_dfloat.errors import DFloatError, FormatError, UnsupportedError, one_line
from vllm_dfloat.storage.stored_tensor import StoredTensor

_INSTEAD = "Serve the model as it is: vllm serve with --quantization dfloat11 compresses it while it loads."


def refuse_unit_names(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse a model with tensors that have the names of parts of a unit.

    Args:
        path: the model's folder.
        tensors: all of its tensors, by name.

    Raises:
        UnsupportedError: one has such a name; a reader of the checkpoint would take it for a part of a unit.
    """
    for name, tensor in tensors.items():
        module, _, field = name.rpartition(".")
        if module and field in FIELDS:
            raise UnsupportedError(
                f"{path / tensor.file.name}: {name}: is named as the tensors of compressed weights are, which end in "
                f"{', '.join(FIELDS)}; expected another name. {_INSTEAD}"
            )


def read_back(target: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Open a checkpoint that was just written, as a reader does, before it counts as finished.

    Args:
        target: its folder, with everything in it.
        tensors: of the original, by name.

    Raises:
        FormatError: it cannot be opened, or lacks tensors of the original.
    """
    try:
        checkpoint = open_checkpoint(target, may_be_unfinished=True)
        shapes = checkpoint.manifest.module_shapes if checkpoint.manifest else None
        found = {item.name: item.shape for item in plan(checkpoint, shapes)}
        checkpoint.validate()
    except DFloatError as error:
        raise FormatError(_unreadable(target, str(error))) from error
    expected = {name: tensor.shape for name, tensor in tensors.items()}
    if found != expected:
        name = min(
            name for name in found.keys() | expected if found.get(name) != expected.get(name)
        )
        raise FormatError(
            _unreadable(
                target, f"{one_line(name)} is {found.get(name)}, {expected.get(name)} before"
            )
        )


def _unreadable(target: Path, why: str) -> str:
    return (
        f"{target}: was written, but cannot be read again: {why.rstrip('.')}; expected the tensors of the original. It "
        f"stays unfinished, and no command takes it. {_INSTEAD}"
    )
