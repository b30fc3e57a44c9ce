"""What several measurements report: the processor, and a file of JSON if one was asked for."""

import json
import platform
from pathlib import Path
from typing import Any


def write_json(file: Path | None, result: dict[str, Any]) -> None:
    """Write `result` to `file`, whose folder is made if it is not there; do nothing without one."""
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n")


def processor() -> str:
    """Return the name of the processor, or else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
