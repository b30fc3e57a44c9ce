"""Helpers of other scripts say how they are called, too."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.mark.parametrize("name", ["bench_report.py", "launch_decode.py"])
def test_help_is_a_usage(name: str) -> None:
    # Bug caught: a traceback.
    ended = subprocess.run(
        [sys.executable, SCRIPTS / name, "--help"], capture_output=True, text=True
    )
    assert ended.returncode == 0
    assert ended.stdout.startswith(f"usage: {name} [-h]")
    assert ended.stderr == ""
