"""Files that texts name are there: READMEs, docs, comments and docstrings outlive many a move."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMED = re.compile(
    r"(?<![\w/.])((?:vllm_dfloat|kernels|scripts|tests|docs|codec|storage|dfloat11|checkpoint|convert|device|integration)"
    r"/[\w/]+\.(?:py|sh|md))\b"
)


def texts() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "*.md", "*.py", "*.sh", "*.toml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("no repository here, only its files")
    return [ROOT / name for name in listed.stdout.splitlines() if not (ROOT / name).is_symlink()]


def test_every_path_that_a_text_names_exists() -> None:
    missing = [
        f"{file.relative_to(ROOT)}: {name}"
        for file in texts()
        if file.exists()
        for name in NAMED.findall(file.read_text())
        if not (ROOT / name).exists() and not (ROOT / "vllm_dfloat" / name).exists()
    ]
    assert missing == []
