"""What vLLM's front end refuses before it starts a worker, so that the sentence is the last of the log.

A folder that compress or decompress has not finished, which has no config.json for vLLM, or an old one; and options of
the plugin that are wrong.
"""

import sys
from collections.abc import Mapping
from functools import wraps
from pathlib import Path
from typing import Any

from vllm_dfloat.checkpoint.folder import (
    CONFIG_FILE,
    CONFIG_KEY,
    is_dfloat11,
    refuse_unfinished,
)
from vllm_dfloat.checkpoint.reader import open_checkpoint
from vllm_dfloat.errors import UnsupportedError, shown
from vllm_dfloat.integration.seam.names import METHOD


def install() -> None:
    """Make vLLM's front end refuse both. A second call changes nothing.

    Does nothing in a process that has not imported vllm.engine.arg_utils: workers refuse them too, later.
    """
    arguments = getattr(sys.modules.get("vllm.engine.arg_utils"), "EngineArgs", None)
    make = getattr(arguments, "create_engine_config", None)
    if arguments is None or make is None or getattr(make, "knows_dfloat11", False):
        return

    @wraps(make)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        refuse(Path(self.model))
        refuse_overrides(Path(self.model), getattr(self, "hf_overrides", None))
        made = make(self, *args, **kwargs)
        if (
            getattr(made, "quant_config", None) is not None
            and made.quant_config.get_name() == METHOD
        ):
            made.quant_config.checked_options(made)
        return made

    create_engine_config.knows_dfloat11 = True  # type: ignore[attr-defined]  # our own mark
    arguments.create_engine_config = create_engine_config


def refuse(folder: Path) -> None:
    """Refuse a folder that compress or decompress has not finished; other folders, and paths of no folder, pass.

    Raises:
        FormatError: it holds a journal, or units of a DFloat11 checkpoint without a config.json.
    """
    if not folder.is_dir():
        return
    refuse_unfinished(folder)
    if not (folder / CONFIG_FILE).exists() and is_dfloat11(folder):
        open_checkpoint(folder)


def refuse_overrides(folder: Path, overrides: Any) -> None:
    """Refuse --hf-overrides that make vLLM take a DFloat11 checkpoint for another; it would look for other tensors.

    Raises:
        UnsupportedError: they do.
    """
    if not isinstance(overrides, Mapping) or not folder.is_dir() or not is_dfloat11(folder):
        return
    for name in {"quantization_config", CONFIG_KEY} & overrides.keys():
        given = overrides[name]
        method = given.get("quant_method", METHOD) if isinstance(given, Mapping) else None
        if method != METHOD:
            raise UnsupportedError(
                f"--hf-overrides: {name} is {shown(given)}, but {folder} holds a DFloat11 checkpoint; "
                f"expected none, or quant_method {METHOD!r}. Leave {name} out, or serve the BF16 original."
            )
