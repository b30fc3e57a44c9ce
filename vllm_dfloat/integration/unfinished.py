"""Refuse a folder that compress or decompress has not finished: it has no config.json for vLLM, or an old one."""

import sys
from functools import wraps
from pathlib import Path
from typing import Any

from vllm_dfloat.checkpoint.folder import CONFIG_FILE, is_dfloat11, refuse_unfinished
from vllm_dfloat.checkpoint.reader import open_checkpoint


def install() -> None:
    """Make vLLM's front end refuse such a folder. A second call changes nothing.

    Does nothing in a process that has not imported vllm.engine.arg_utils: workers refuse the folder when they read it.
    """
    arguments = getattr(sys.modules.get("vllm.engine.arg_utils"), "EngineArgs", None)
    make = getattr(arguments, "create_engine_config", None)
    if arguments is None or make is None or getattr(make, "knows_dfloat11", False):
        return

    @wraps(make)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        refuse(Path(self.model))
        return make(self, *args, **kwargs)

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
