"""Make one file of a DFloat11 checkpoint: encode its units, write them, decode what was written and compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_dfloat.checkpoint.code_tables import FIRST_POINTER
from vllm_dfloat.checkpoint.decode_unit import decode_unit
from vllm_dfloat.checkpoint.encode_unit import Tensors, encode_unit
from vllm_dfloat.checkpoint.plan_units import PlannedUnit, is_expert
from vllm_dfloat.checkpoint.safetensors_file import StoredTensor, read_header
from vllm_dfloat.checkpoint.unit import FIELDS, UnitEntry
from vllm_dfloat.checkpoint.write_safetensors import (
    array_item,
    copy_item,
    replacing,
    write_safetensors,
)
from vllm_dfloat.codec.encode import count_exponents
from vllm_dfloat.errors import FormatError, UnsupportedError

U16Array = npt.NDArray[np.uint16]
_COMPARED_AT_ONCE = 1 << 23  # weights


@dataclass(frozen=True)
class FileJob:
    """A file to be written.

    Attributes:
        file: its name.
        units: what is to be compressed in it.
        plain: names of tensors copied as they are.
        metadata: of the safetensors header.
    """

    file: str
    units: tuple[PlannedUnit, ...]
    plain: tuple[str, ...]
    metadata: Mapping[str, str] | None = None

    @property
    def tensors(self) -> tuple[str, ...]:
        """Return the names of all tensors that go into the file."""
        return tuple(name for unit in self.units for name in unit.tensors) + self.plain


@dataclass(frozen=True)
class FileResult:
    """A file that was written and checked.

    Attributes:
        file, num_bytes, sha256: the file.
        units: the units that it holds; fewer or smaller ones than planned where the format could not hold a weight.
        left: tensor name -> why it stayed as it was, though it was planned for a unit.
    """

    file: str
    num_bytes: int
    sha256: str
    units: tuple[PlannedUnit, ...]
    left: Mapping[str, str]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> FileResult:
        units = tuple(
            PlannedUnit(unit["name"], tuple(unit["members"]), tuple(unit["tensors"]))
            for unit in content["units"]
        )
        return cls(content["file"], content["num_bytes"], content["sha256"], units, content["left"])


def compress_file(job: FileJob, tensors: Mapping[str, StoredTensor], folder: Path) -> FileResult:
    """Write `job` into `folder` and return what it holds. The file has its name only once it was compared.

    Args:
        job: what to write.
        tensors: the original tensors that it needs, by name.
        folder: an existing folder.

    Raises:
        FormatError: what was written does not decode to the original bits.
        OSError: the disk is full, or the like.
    """
    left: dict[str, str] = {}
    units: list[PlannedUnit] = []
    items = []
    for planned in job.units:
        encoded = _encode(planned, tensors, left)
        if encoded is not None:
            unit, fields = encoded
            units.append(unit)
            items += [
                array_item(f"{unit.name}.{field}", array, FIELDS[field][0])
                for field, array in fields.items()
            ]
    items += [copy_item(tensors[name]) for name in (*left, *job.plain)]
    with replacing(folder / job.file) as temporary:
        written = write_safetensors(temporary, items, job.metadata)
        del items
        _compare(temporary, units, tensors)
    return FileResult(job.file, written.num_bytes, written.sha256, tuple(units), left)


def _encode(
    planned: PlannedUnit, tensors: Mapping[str, StoredTensor], left: dict[str, str]
) -> tuple[PlannedUnit, Tensors] | None:
    """Return the unit and its six tensors without the weights that go into `left`, None if nothing remains."""
    unit = planned
    while unit.tensors:
        weights: list[U16Array] = [tensors[name].bits() for name in unit.tensors]
        try:
            fields = encode_unit(weights, unit.name)
        except UnsupportedError as error:
            reasons = _reasons(unit, weights, str(error))
            left.update(reasons)
            unit = _without(unit, reasons)
            continue
        before = 2 * sum(weight.size for weight in weights)
        after = sum(array.nbytes for array in fields.values())
        if after < before:
            return unit, fields
        reason = f"compressed it would take {after} bytes, as it is {before}"
        left.update(
            dict.fromkeys(unit.tensors, reason if len(weights) == 1 else f"{unit.name}: {reason}")
        )
        return None
    return None


def _reasons(unit: PlannedUnit, weights: Sequence[U16Array], error: str) -> dict[str, str]:
    """Return why which weights of a unit must be left out for the rest to fit."""
    reasons = {}
    for name, weight in zip(unit.tensors, weights, strict=True):
        large = int(count_exponents(weight.reshape(-1))[FIRST_POINTER:].sum())
        if large:
            reasons[name] = (
                f"{large} of its weights are Inf, NaN or 2**113 and more, for which the format has no exponent"
            )
    if not reasons or is_expert(unit.name):
        # The experts of a model share a pattern: all of an expert is compressed, or nothing.
        return {name: reasons.get(name, error) for name in unit.tensors}
    return reasons


def _without(unit: PlannedUnit, names: Mapping[str, str]) -> PlannedUnit:
    kept = [i for i, name in enumerate(unit.tensors) if name not in names]
    members = tuple(unit.members[i] for i in kept) if unit.members else ()
    return PlannedUnit(unit.name, members, tuple(unit.tensors[i] for i in kept))


def _compare(file: Path, units: Sequence[PlannedUnit], tensors: Mapping[str, StoredTensor]) -> None:
    """Decode the units of a file just written and compare them with the originals, some weights at a time."""
    stored = read_header(file)
    for planned in units:
        fields = {field: stored[f"{planned.name}.{field}"] for field in FIELDS}
        unit = UnitEntry(planned.name, planned.members, fields).load()
        at = 0
        for name in planned.tensors:
            original = tensors[name].bits().reshape(-1)
            for first in range(0, original.size, _COMPARED_AT_ONCE):
                part = original[first : first + _COMPARED_AT_ONCE]
                if not np.array_equal(decode_unit(unit, at + first, at + first + part.size), part):
                    raise FormatError(
                        f"{file.name}: {name}: the bytes just written do not decode to the original bits. The memory "
                        "or the disk of this machine cannot be trusted; the file is not kept."
                    )
            at += original.size
