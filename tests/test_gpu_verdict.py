"""The verdict of a GPU, rehearsed without one: the whole flow on tiny sizes, and what it refuses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "scripts/results"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = [ROOT / "scripts/gpu_verdict.sh", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)


@pytest.mark.on_demand  # two minutes: before a GPU is used, and in the nightly run
def test_rehearsal_goes_through_every_part_and_leaves_no_result_behind(tmp_path: Path) -> None:
    before = sorted(RESULTS.rglob("*"))
    result = run("--device", "cpu", "--output", str(tmp_path / "found.json"))
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert lines[-1] == "verdict: the rehearsal went well; nothing was measured."
    compared = lines.index("right bits: encoder")
    tested = next(i for i, line in enumerate(lines) if " passed" in line)
    timed = next(i for i, line in enumerate(lines) if line.startswith("section "))
    assert compared < tested < timed  # bits before times
    found = json.loads((tmp_path / "found.json").read_text())
    assert "interpreter" in found["environment"]["device"]
    assert found["environment"]["failures"] == []
    sections = {"decode", "fused", "layouts", "block", "overlap", "encode", "decode_rows"}
    assert {row["section"] for row in found["rows"]} == sections
    assert sorted(RESULTS.rglob("*")) == before


def test_without_a_gpu_it_says_in_a_sentence_that_it_cannot_run() -> None:
    result = run()
    assert result.returncode == 2
    assert "no CUDA device is available" in result.stderr
    assert result.stdout.splitlines()[-1].startswith("verdict: it cannot run here")


@pytest.mark.parametrize("arguments", [("--device",), ("--device", "tpu"), ("--fast", "yes")])
def test_arguments_that_it_does_not_know_are_refused(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("usage: ")


ONE_TEST = """
import pytest

@pytest.mark.gpu
def test_on_a_gpu():
    {body}
"""


@pytest.mark.parametrize(
    ("body", "status"), [("pytest.skip('no GPU')", 1), ("pass", 0), ("raise ValueError", 1)]
)
def test_run_that_was_to_prove_something_about_a_gpu_fails_if_it_ran_no_test_on_one(
    body: str, status: int, tmp_path: Path
) -> None:
    # Bug caught: every test skipped, exit status 0, and a verdict that says all is well.
    shutil.copy(ROOT / "tests/conftest.py", tmp_path)
    (tmp_path / "test_one.py").write_text(ONE_TEST.format(body=body))
    env = {**os.environ, "VLLM_DFLOAT_REQUIRE_GPU": "1"}
    options = ["-c", os.devnull, "--rootdir", str(tmp_path), "-p", "no:cacheprovider"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", *options, str(tmp_path)],
        env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == status, result.stdout
    assert ("proves nothing" in result.stdout) == ("skip" in body)
