"""Open an official DFloat11 checkpoint: config.json, and units found by tensor name in all files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_dfloat.checkpoint.completeness import refuse_gaps
from vllm_dfloat.checkpoint.folder import CONFIG_KEY, refuse_unfinished, stored_tensors
from vllm_dfloat.checkpoint.listing import weight_files
from vllm_dfloat.checkpoint.manifest import (
    Manifest,
    read_manifest,
    refuse_missing_weights,
    refuse_other_files,
    refuse_other_units,
)
from vllm_dfloat.checkpoint.patterns import Patterns
from vllm_dfloat.checkpoint.settings import read_settings
from vllm_dfloat.dfloat11.format import FIELDS
from vllm_dfloat.dfloat11.unit_entry import UnitEntry, check_entry
from vllm_dfloat.errors import FormatError
from vllm_dfloat.storage.stored_tensor import StoredTensor


@dataclass(frozen=True)
class Dfloat11Checkpoint:
    """An official DFloat11 checkpoint whose headers and config have been checked.

    Attributes:
        path: its directory.
        config: config.json as a dictionary.
        units: the compressed modules by module path.
        plain: every tensor that belongs to no unit, by tensor name.
        manifest: its list of files, compared with their names, sizes and headers; None without one.
    """

    path: Path
    config: Mapping[str, Any]
    units: Mapping[str, UnitEntry]
    plain: Mapping[str, StoredTensor]
    manifest: Manifest | None = None

    @property
    def names(self) -> frozenset[str]:
        """Return the names of all tensors, compressed and plain, as far as they are known without a model class."""
        return frozenset(self.plain) | {name for u in self.units.values() for name in u.names}

    def validate(self) -> None:
        """Check every unit's tables, positions and splits; decodes nothing.

        Raises:
            FormatError: a unit cannot be decoded.
        """
        for unit in self.units.values():
            unit.open()


def open_checkpoint(path: str | Path, may_be_unfinished: bool = False) -> Dfloat11Checkpoint:
    """Open the DFloat11 checkpoint in directory `path`.

    Reads config.json and the headers of all *.safetensors files there. File names, and which tensors share
    a file, have no meaning. No tensor is read.

    Args:
        path: the directory.
        may_be_unfinished: True for the command that writes it and checks what it has written.

    Raises:
        FormatError: the directory is no DFloat11 checkpoint, or one of its files is damaged.
        UnsupportedError: a legacy (0.1.0) checkpoint, or settings that were never published.
    """
    path = Path(path)
    if not path.is_dir():
        raise FormatError(f"{path}: not a directory; a DFloat11 checkpoint is one.")
    if not may_be_unfinished:
        refuse_unfinished(path)
    files = weight_files(path)
    config, patterns = read_settings(path, files)
    if not files:
        raise FormatError(
            f"{path}: config.json has {CONFIG_KEY}, but there is no *.safetensors file beside it."
        )
    manifest = read_manifest(path)
    if manifest:
        refuse_other_files(path, manifest)
    tensors = stored_tensors(path, may_be_unfinished)
    parameters = manifest.parameters if manifest else frozenset()
    found = _fields(tensors)
    patterns.check_steps(list(found))
    units = {name: _unit(name, fields, patterns, parameters) for name, fields in found.items()}
    used = {tensor.name for unit in units.values() for tensor in unit.fields.values()}
    plain = {name: tensor for name, tensor in tensors.items() if name not in used}
    _refuse_stored_twice(units, plain)
    checkpoint = Dfloat11Checkpoint(path, config, units, plain, manifest)
    if manifest:
        refuse_missing_weights(path, manifest, checkpoint.names)
        refuse_other_units(path, manifest, config)
    else:
        refuse_gaps(path, config, patterns, checkpoint.names)
    return checkpoint


def _fields(tensors: dict[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """Return the fields of every unit: tensors named `<module path>.<field>`."""
    units: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        module, _, field = name.rpartition(".")
        if module and field in FIELDS:
            units.setdefault(module, {})[field] = tensor
    return units


def _unit(
    name: str, fields: dict[str, StoredTensor], patterns: Patterns, parameters: frozenset[str]
) -> UnitEntry:
    some = next(iter(fields.values()))
    missing = [field for field in FIELDS if field not in fields]
    if missing:
        raise FormatError(
            f"{some.file}: {name}: found {', '.join(sorted(fields))} without "
            f"{', '.join(missing)}; a DFloat11 unit has all six tensors."
        )
    members = patterns.members(name)
    if members is None:
        raise FormatError(
            f"{some.file}: {name}: no key of pattern_dict in config.json matches this unit; "
            f"found keys {[key.pattern for key, _ in patterns.entries][:20]}."
        )
    entry = UnitEntry(name, members, fields, parameters)
    check_entry(entry)
    return entry


def _refuse_stored_twice(units: Mapping[str, UnitEntry], plain: Mapping[str, StoredTensor]) -> None:
    holders: dict[str, UnitEntry] = {}
    for unit in units.values():
        for name in unit.names:
            other = holders.setdefault(name, unit)
            if other is not unit:
                raise FormatError(
                    f"{unit.fields['luts'].file}: {unit.name}: its weight {name} is also in the unit "
                    f"{other.name}; it is expected once."
                )
            if name in plain:
                raise FormatError(
                    f"{plain[name].where}: the weight is also in the DFloat11 unit {unit.name} "
                    f"({unit.fields['luts'].file.name}); it is expected once."
                )
