"""A folder that compress or decompress has not finished: vLLM only finds no config.json there, or an old one."""

import sys
from functools import wraps
from pathlib import Path
from typing import Any

from vllm_dfloat.checkpoint.folder import CONFIG_FILE, is_dfloat11, refuse_unfinished
from vllm_dfloat.checkpoint.reader import open_checkpoint


def install() -> None:
    """Let vLLM say what to do about such a folder. A second call changes nothing.

    Only where the front end has loaded its arguments: workers see the folder when they read it.
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
    """Refuse a folder that a command of ours has not finished; anything else, and no folder, passes.

    Raises:
        FormatError: it holds a journal, or units of a DFloat11 checkpoint that nothing names.
    """
    if not folder.is_dir():
        return
    refuse_unfinished(folder)
    if not (folder / CONFIG_FILE).exists() and is_dfloat11(folder):
        open_checkpoint(folder)
