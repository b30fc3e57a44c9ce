"""The first run on a machine says that it compiles."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from dfloat11_helpers import stored_unit, write_checkpoint
from pool_jobs import compile_twice

from vllm_dfloat.commands import progress
from vllm_dfloat.commands.progress import COMPILING, Bar
from vllm_dfloat.convert.worker_pool import run_jobs


@pytest.fixture(autouse=True)
def _tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "tells_compiling", True)


def test_a_cold_cache_is_one_line_on_stderr_and_a_warm_one_none(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", {"odd77": stored_unit("edge-good", "odd77")})
    for expected in (COMPILING + "\n", ""):
        done = subprocess.run(
            [sys.executable, "-m", "vllm_dfloat.cli", "verify", str(model)],
            env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0
        assert done.stderr == expected
        assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize("start", [True, False])
def test_compiling_is_told_once_and_not_with_quiet_or_after_the_command(
    start: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    for quiet in (False, True):
        with Bar(quiet) as bar:
            if start:
                bar.start(10)
            compile_twice()
        compile_twice()
        assert capsys.readouterr().err == ("" if quiet else COMPILING + "\n")


def test_a_process_of_a_pool_that_compiles_is_told_of_once(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with Bar(quiet=False):
        assert list(run_jobs(compile_twice, [(), ()], 2, 1, lambda _: None)) == [None, None]
    assert capfd.readouterr().err == COMPILING + "\n"
