"""`dfloat11_config`: the units of a checkpoint and the weights in them, from config.json or from a header."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from vllm_dfloat.checkpoint.folder import CONFIG_FILE, CONFIG_KEY, is_unit_field, read_config
from vllm_dfloat.checkpoint.listing import visible_files
from vllm_dfloat.checkpoint.manifest import MANIFEST_FILE
from vllm_dfloat.checkpoint.patterns import Patterns, compile_patterns
from vllm_dfloat.errors import FormatError, UnsupportedError, shown
from vllm_dfloat.storage.safetensors_read import read_names

_THREADS_PER_BLOCK = [512]
_BYTES_PER_THREAD = 8


def read_settings(path: Path, files: Sequence[Path]) -> tuple[dict[str, Any], Patterns]:
    """Return the config of a checkpoint, `dfloat11_config` in it, and its compiled patterns.

    Args:
        path: its folder.
        files: its weight files. If config.json has no settings, the metadata in their headers may have them, as JSON.

    Raises:
        FormatError: the folder is no DFloat11 checkpoint, or its settings are damaged.
        UnsupportedError: a legacy (0.1.0) checkpoint, or settings that were never published.
    """
    config = read_config(path)
    if config is not None and CONFIG_KEY in config:
        return config, parse_config(config[CONFIG_KEY], f"{path / CONFIG_FILE}: {CONFIG_KEY}")
    settings, where = _from_headers(files)
    if not where:
        _refuse_directory(path, config, files)
    return {**(config or {}), CONFIG_KEY: settings}, parse_config(settings, where)


def _from_headers(files: Sequence[Path]) -> tuple[Any, str]:
    """Return the settings in the files' headers and the place for messages; None and "" if there are none."""
    found: dict[str, Path] = {}
    for file in files:
        text = read_names(file)[1].get(CONFIG_KEY)
        if isinstance(text, str):
            found.setdefault(text, file)
    if not found:
        return None, ""
    (text, file), *others = found.items()
    where = f"{file}: {CONFIG_KEY} in its header"
    if others:
        raise FormatError(
            f"{where}: differs from that of {others[0][1].name}; one is expected. The files belong to different "
            "checkpoints: give each a folder of its own."
        )
    try:
        return json.loads(text), where
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: is not valid JSON: {error}.") from error


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


def _refuse_directory(path: Path, config: dict[str, Any] | None, files: Sequence[Path]) -> NoReturn:
    pickles = visible_files(path, "*.pkl")
    if pickles:
        raise UnsupportedError(
            f"{path}: found {pickles[0].name} and no {CONFIG_KEY} in config.json: the legacy "
            "DFloat11 0.1.0 layout, whose pickle files can run code when they are read. Expected "
            f"are *.safetensors and {CONFIG_KEY}; use a release made with DFloat11 0.2.0 or later."
        )
    found = "no config.json" if config is None else f"a config.json without {CONFIG_KEY}"
    units = [name for file in files for name in read_names(file)[0] if is_unit_field(name)]
    if units and (path / MANIFEST_FILE).exists():
        raise FormatError(
            f"{path}: found {found}; {MANIFEST_FILE} beside it was made with one that has {CONFIG_KEY}. Fetch "
            "config.json again, or make the checkpoint again."
        )
    if units:
        raise FormatError(
            f"{path}: found {found} and DFloat11 units, such as {shown(units[0].rpartition('.')[0])}, whose weights "
            f"have no names: {CONFIG_KEY} was expected in config.json or in a header. If this is a compression that "
            f"was interrupted, run vllm-dfloat compress SOURCE {shlex.quote(str(path))} --force again; a file made "
            f"for ComfyUI needs a config.json with the {CONFIG_KEY} that its node holds."
        )
    raise FormatError(
        f"{path}: found {found} and {len(files)} *.safetensors file(s); "
        f"a DFloat11 checkpoint has {CONFIG_KEY} in config.json. If its weights are BF16 already, use it as it is; if "
        "not, fetch the checkpoint again."
    )
