"""Open an official DFloat11 checkpoint: config.json, and units found by tensor name in all files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from vllm_dfloat.checkpoint.folder import CONFIG_FILE, CONFIG_KEY, read_config, stored_tensors
from vllm_dfloat.checkpoint.listing import visible_files, weight_files
from vllm_dfloat.checkpoint.manifest import read_manifest
from vllm_dfloat.checkpoint.patterns import Patterns, compile_patterns
from vllm_dfloat.checkpoint.safetensors_file import StoredTensor
from vllm_dfloat.checkpoint.unit import FIELDS, UnitEntry, check_entry
from vllm_dfloat.errors import FormatError, UnsupportedError, shown

_THREADS_PER_BLOCK = [512]
_BYTES_PER_THREAD = 8


@dataclass(frozen=True)
class Dfloat11Checkpoint:
    """An official DFloat11 checkpoint whose headers and config have been checked.

    Attributes:
        path: its directory.
        config: config.json as a dictionary.
        units: the compressed modules by module path.
        plain: every tensor that belongs to no unit, by tensor name.
    """

    path: Path
    config: Mapping[str, Any]
    units: Mapping[str, UnitEntry]
    plain: Mapping[str, StoredTensor]

    @property
    def tie_word_embeddings(self) -> bool | None:
        """Return what config.json says about tied embeddings, None if it says nothing."""
        text = self.config.get("text_config")
        for config in (self.config, text if isinstance(text, dict) else {}):
            if isinstance(config.get("tie_word_embeddings"), bool):
                return bool(config["tie_word_embeddings"])
        return None

    def validate(self) -> None:
        """Check every unit's tables, positions and splits; decodes nothing.

        Raises:
            FormatError: a unit cannot be decoded.
        """
        for unit in self.units.values():
            unit.load()


def open_checkpoint(path: str | Path) -> Dfloat11Checkpoint:
    """Open the DFloat11 checkpoint in directory `path`.

    Reads config.json and the headers of all *.safetensors files there; file names and grouping
    carry no meaning. No tensor is read.

    Raises:
        FormatError: the directory is no DFloat11 checkpoint, or one of its files is damaged.
        UnsupportedError: a legacy (0.1.0) checkpoint, or settings that were never published.
    """
    path = Path(path)
    if not path.is_dir():
        raise FormatError(f"{path}: not a directory; a DFloat11 checkpoint is one.")
    config = read_config(path)
    files = weight_files(path)
    if config is None or CONFIG_KEY not in config:
        _refuse_directory(path, config, files)
    patterns = parse_config(config[CONFIG_KEY], f"{CONFIG_FILE}: {CONFIG_KEY}")
    if not files:
        raise FormatError(
            f"{path}: config.json has {CONFIG_KEY}, but there is no *.safetensors file beside it."
        )
    tensors = stored_tensors(path)
    manifest = read_manifest(path)
    parameters = manifest.parameters if manifest else frozenset()
    groups = _group(tensors)
    patterns.check_steps(list(groups))
    units = {name: _unit(name, fields, patterns, parameters) for name, fields in groups.items()}
    used = {tensor.name for unit in units.values() for tensor in unit.fields.values()}
    plain = {name: tensor for name, tensor in tensors.items() if name not in used}
    _refuse_stored_twice(units, plain)
    return Dfloat11Checkpoint(path, config, units, plain)


def parse_config(config: Any, where: str) -> Patterns:
    """Check a `dfloat11_config` object and return its compiled patterns."""
    keys = ("version", "threads_per_block", "bytes_per_thread", "pattern_dict")
    if not isinstance(config, dict) or set(config) != set(keys):
        found = sorted(config)[:20] if isinstance(config, dict) else type(config).__name__
        raise FormatError(f"{where}: found {found}; an object with {', '.join(keys)} is expected.")
    if not isinstance(config["version"], str):
        raise FormatError(f"{where}: version is {shown(config['version'])}; a string is expected.")
    if config["threads_per_block"] != _THREADS_PER_BLOCK:
        raise UnsupportedError(
            f"{where}: threads_per_block is {shown(config['threads_per_block'])}; "
            f"{_THREADS_PER_BLOCK} is the only published value."
        )
    if config["bytes_per_thread"] != _BYTES_PER_THREAD:
        raise UnsupportedError(
            f"{where}: bytes_per_thread is {shown(config['bytes_per_thread'])}; "
            f"{_BYTES_PER_THREAD} is the only published value."
        )
    pattern_dict = config["pattern_dict"]
    if not isinstance(pattern_dict, dict) or not all(
        isinstance(names, list) and all(isinstance(name, str) for name in names)
        for names in pattern_dict.values()
    ):
        raise FormatError(
            f"{where}: pattern_dict must be an object of lists of attribute paths, regex -> list."
        )
    return compile_patterns(pattern_dict, f"{where}: pattern_dict")


def _refuse_directory(path: Path, config: dict[str, Any] | None, files: list[Path]) -> NoReturn:
    pickles = visible_files(path, "*.pkl")
    if pickles:
        raise UnsupportedError(
            f"{path}: found {pickles[0].name} and no {CONFIG_KEY} in config.json: the legacy "
            "DFloat11 0.1.0 layout, whose pickle files can run code when they are read. Expected "
            f"are *.safetensors and {CONFIG_KEY}; use a release made with DFloat11 0.2.0 or later."
        )
    found = "no config.json" if config is None else f"a config.json without {CONFIG_KEY}"
    raise FormatError(
        f"{path}: found {found} and {len(files)} *.safetensors file(s); "
        f"a DFloat11 checkpoint has {CONFIG_KEY} in config.json."
    )


def _group(tensors: dict[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
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
            f"{some.file.name}: {name}: found {', '.join(sorted(fields))} without "
            f"{', '.join(missing)}; a DFloat11 unit has all six tensors."
        )
    members = patterns.members(name)
    if members is None:
        raise FormatError(
            f"{some.file.name}: {name}: no key of pattern_dict in config.json matches this unit; "
            f"found keys {[key.pattern for key, _ in patterns.entries][:20]}."
        )
    entry = UnitEntry(name, members, fields, parameters)
    check_entry(entry)
    return entry


def _refuse_stored_twice(units: Mapping[str, UnitEntry], plain: Mapping[str, StoredTensor]) -> None:
    holders: dict[str, UnitEntry] = {}
    for unit in units.values():
        # The list of a module that is itself the weight means nothing.
        listed = unit.members if unit.num_members == len(unit.members) else ("",)
        for member in listed:
            path = f"{unit.name}.{member}" if member else unit.name
            name = path if path in unit.parameters else f"{path}.weight"
            other = holders.setdefault(name, unit)
            if other is not unit:
                raise FormatError(
                    f"{unit.fields['luts'].file.name}: {unit.name}: its weight {name} is also in the unit "
                    f"{other.name}; it is expected once."
                )
            if name in plain:
                raise FormatError(
                    f"{plain[name].where}: the weight is also in the DFloat11 unit {unit.name} "
                    f"({unit.fields['luts'].file.name}); it is expected once."
                )
