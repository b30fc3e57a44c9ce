"""Make one file of a DFloat11 checkpoint: encode its units, write them, decode what was written and compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_dfloat.convert.conversion import FileResult
from vllm_dfloat.convert.units import PlannedUnit, is_expert
from vllm_dfloat.dfloat11.check import check_unit
from vllm_dfloat.dfloat11.coder import Coder, CpuCoder
from vllm_dfloat.dfloat11.encode import CountedWeights, MeasuredUnit, count_weights, measure_unit
from vllm_dfloat.dfloat11.format import FIELDS, FIRST_POINTER
from vllm_dfloat.dfloat11.unit_entry import UnitEntry
from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.storage.file_identity import unchanged
from vllm_dfloat.storage.pieces import StoredWeights
from vllm_dfloat.storage.progress import COMPARE, COUNT, ENCODE, SIGNS, Advance, Progress, ignore
from vllm_dfloat.storage.safetensors_read import read_header
from vllm_dfloat.storage.safetensors_write import Item, copy_item, replacing, write_safetensors
from vllm_dfloat.storage.stored_tensor import StoredTensor, files_of


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
class CompressedFile(FileResult):
    """A file that was written and checked.

    Attributes:
        units: the units that it holds; fewer or smaller ones than planned where the format could not hold a weight.
        left: tensor name -> why it stayed as it was, though it was planned for a unit.
    """

    units: tuple[PlannedUnit, ...]
    left: Mapping[str, str]

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> CompressedFile:
        units = tuple(
            PlannedUnit(unit["name"], tuple(unit["members"]), tuple(unit["tensors"]))
            for unit in content["units"]
        )
        return cls(content["file"], content["num_bytes"], content["sha256"], units, content["left"])


def compress_file(
    job: FileJob,
    tensors: Mapping[str, StoredTensor],
    folder: Path,
    coder: Coder | None = None,
    report: Advance = ignore,
) -> CompressedFile:
    """Write `job` into `folder` and return what the file holds. It gets its name after it was compared.

    Args:
        job: what to write.
        tensors: the original tensors that it needs, by name.
        folder: an existing folder.
        coder: encodes and decodes; by default the CPU does.
        report: called with sixteenths of bytes, in the end as many as `tensors` have.

    Raises:
        ChangedError: a file with original tensors is not what it was when it was opened.
        FormatError: what was written does not decode to the original bits.
        OSError: the disk is full, or the like.
    """
    coder = coder or CpuCoder()
    progress = Progress(sum(tensor.num_bytes for tensor in tensors.values()), report)
    left: dict[str, str] = {}
    units: list[PlannedUnit] = []
    items: list[Item] = []
    for planned in job.units:
        counted = {
            name: count_weights(StoredWeights(tensors[name]), coder, progress.phase(COUNT))
            for name in planned.tensors
        }
        measured = _measure(planned, counted, left)
        if measured is not None:
            unit, encoded = measured
            units.append(unit)
            items += _items(unit.name, encoded, coder, progress)
    items += [copy_item(tensors[name], progress.copied) for name in (*left, *job.plain)]
    originals = files_of(tensors.values())
    with replacing(folder / job.file) as temporary, unchanged(originals):
        written = write_safetensors(temporary, items, job.metadata)
        stored = read_header(temporary)
        for unit in units:
            fields = {field: stored[f"{unit.name}.{field}"] for field in FIELDS}
            members = [tensors[name] for name in unit.tensors]
            entry = UnitEntry(unit.name, unit.members, fields)
            check_unit(entry, members, coder, progress.phase(COMPARE))
    progress.finish()
    return CompressedFile(job.file, written.num_bytes, written.sha256, tuple(units), left)


def _items(name: str, unit: MeasuredUnit, coder: Coder, progress: Progress) -> list[Item]:
    """Return the six tensors of a unit, which are encoded while they are written.

    By their names the stream is written before gaps and positions, which are made with it.
    """
    shapes = unit.shapes
    pieces = unit.tensors(coder, progress.phase(ENCODE), progress.phase(SIGNS))
    return [
        Item(f"{name}.{field}", FIELDS[field][0], shapes[field], pieces[field]) for field in FIELDS
    ]


def _measure(
    planned: PlannedUnit, counted: Mapping[str, CountedWeights], left: dict[str, str]
) -> tuple[PlannedUnit, MeasuredUnit] | None:
    """Return the unit, without weights that go into `left`, and its sizes; None if nothing remains."""
    unit = planned
    while unit.tensors:
        try:
            measured = measure_unit([counted[name] for name in unit.tensors], unit.name)
        except UnsupportedError as error:
            reasons = _reasons(unit, counted, str(error))
            left.update(reasons)
            unit = _without(unit, reasons)
            continue
        before, after = 2 * measured.num_weights, measured.num_bytes
        if after < before:
            return unit, measured
        reason = f"compressed it would take {after} bytes, as it is {before}"
        left.update(
            dict.fromkeys(
                unit.tensors, reason if len(unit.tensors) == 1 else f"{unit.name}: {reason}"
            )
        )
        return None
    return None


def _reasons(
    unit: PlannedUnit, counted: Mapping[str, CountedWeights], error: str
) -> dict[str, str]:
    """Return name -> reason for the weights of a unit that must be left out for the rest to fit."""
    reasons = {}
    for name in unit.tensors:
        large = int(counted[name].counts[FIRST_POINTER:].sum())
        if large:
            reasons[name] = (
                f"{large} of its weights are Inf, NaN or 2**113 and more, for which the format has no exponent"
            )
    if not reasons or is_expert(unit.name):
        # The experts of a model share a pattern: an expert is compressed as a whole, or not at all.
        return {name: reasons.get(name, error) for name in unit.tensors}
    return reasons


def _without(unit: PlannedUnit, names: Mapping[str, str]) -> PlannedUnit:
    kept = [i for i, name in enumerate(unit.tensors) if name not in names]
    members = tuple(unit.members[i] for i in kept) if unit.members else ()
    return PlannedUnit(unit.name, members, tuple(unit.tensors[i] for i in kept))
