"""The GPU verdict, rehearsed without a GPU: the whole flow on tiny sizes, and its refusals."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "scripts/results"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = [ROOT / "scripts/gpu_verdict.sh", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)


def logs_of(folder: Path) -> set[str]:
    with tarfile.open(folder / "logs.tar.gz") as archive:
        return {Path(name).name for name in archive.getnames() if name.endswith((".log", ".txt"))}


@pytest.mark.on_demand
def test_a_run_that_is_told_to_end_leaves_its_results_and_logs_in_few_files(tmp_path: Path) -> None:
    # Bug caught: more files than a GPU host gives back, and none of the logs of an ended run.
    env = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = [ROOT / "scripts/gpu_verdict.sh", "--device", "cpu", "--out", str(tmp_path)]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if line.startswith("== bits (at "):
                running.send_signal(signal.SIGTERM)
                break
        printed = running.stdout.read()
        assert running.wait(60) == 143
    assert "verdict: ended by a signal after" in printed
    assert printed.splitlines()[-1] == (tmp_path / "verdict.log").read_text().splitlines()[-1]
    assert logs_of(tmp_path) == {"bits.log"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs.tar.gz", "verdict.log"]


@pytest.mark.on_demand  # minutes: with --full, before a GPU is used
def test_rehearsal_goes_through_its_parts_and_leaves_results_only_where_it_was_told(
    tmp_path: Path,
) -> None:
    before = sorted(RESULTS.rglob("*"))
    result = run(
        "--device", "cpu", "--out", str(tmp_path), "--limit", "900", "--commit", "0123abcd"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert lines[-1] == "verdict: the rehearsal went well; nothing was measured."
    begun = [line.split(" (at")[0].removeprefix("== ") for line in lines if " (at" in line]
    assert begun == [
        *REACHED,
        "times of runs, blocks, layouts, rows, other sizes",
        "LM heads in slabs",
    ]
    compared = next(i for i, line in enumerate(lines) if line.startswith("right bits: encoder"))
    timed = next(i for i, line in enumerate(lines) if line.startswith("section "))
    tested = next(i for i, line in enumerate(lines) if " passed" in line)
    assert compared < timed < tested
    sections = set()
    for name in ("times1.json", "times2.json", "experts.json", "in_order.json", "slabs.json"):
        found = json.loads((tmp_path / name).read_text())
        assert "interpreter" in found["environment"]["device"]
        assert found["environment"]["commit"] == "0123abcd"
        assert found["environment"]["failures"] == found["environment"]["wrong_bits"] == []
        sections |= {row["section"] for row in found["rows"]}
    assert sections == {
        "decode", "fused", "fast", "fast_fused", "experts", "experts_fused", "layouts", "block", "overlap", "encode",
        "decode_rows", "slabs", "in_order", "runs",
    }  # fmt: skip
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [
        "experts.json", "in_order.json", "logs.tar.gz", "order.json", "slabs.json", "times1.json",
        "times2.json", "verdict.log",
    ]  # fmt: skip
    assert logs_of(tmp_path) == {"bits.log", "tests.log", "times.log"}
    assert sorted(RESULTS.rglob("*")) == before


REACHED = [
    "bits", "products of the fast layout", "times of experts", "times of decode and encode", "order",
    "tests marked gpu",
]  # fmt: skip
UNTIL_THE_FIRST = 10  # seconds that a visit takes to find out about its machine; 9 on an H200
PYTHON = """#!/bin/bash
case $* in
  *bench_setup.py*) echo '{}' ;;
  *xdist*) exit 1 ;;
esac
"""
# Uses up its time at once, and writes down how much that is.
TIMEOUT = """#!/bin/bash
kill=${2#--kill-after=}
echo $((kill + $3)) >>"$(dirname "$0")/most"
exit 124
"""


def test_all_that_a_visit_is_for_is_reached_even_if_each_section_takes_all_of_its_time(
    tmp_path: Path,
) -> None:
    # Bug caught: times of decode and the order of cuBLASLt after sections that may use up the whole visit.
    for name, text in (("python", PYTHON), ("timeout", TIMEOUT)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    env = {
        **os.environ,
        "PYTHON": str(tmp_path / "python"),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    command = [ROOT / "scripts/gpu_verdict.sh", "--limit", "330", "--out", str(tmp_path / "out")]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    begun = re.findall(r"^== (.*) \(at (\d+) s, at most (\d+) s\)$", result.stdout, re.MULTILINE)
    assert [name for name, _, _ in begun][: len(REACHED)] == REACHED, result.stdout
    most = [int(seconds) for _, _, seconds in begun]
    assert [int(seconds) for seconds in (tmp_path / "most").read_text().split()] == most
    # None has taken any time, so each may take what all before it have left, and ends when they would have.
    ends = [int(at) + seconds for (_, at, _), seconds in zip(begun, most, strict=True)]
    own = [b - a for a, b in pairwise([UNTIL_THE_FIRST, *ends[: len(REACHED)]])]
    assert ends[len(REACHED) - 1] <= 330
    assert min(own) >= 25
    assert own[0] + own[1] >= 180


def test_time_that_is_up_ends_the_parts_and_names_those_that_did_not_run(tmp_path: Path) -> None:
    result = run("--device", "cpu", "--out", str(tmp_path), "--limit", "1")
    assert result.returncode == 1  # nothing was found right
    assert "note: no time was left for tests marked gpu" in result.stdout
    assert "problem: no kernel's bits were found right" in result.stdout


def test_without_a_gpu_it_says_in_a_sentence_that_it_cannot_run() -> None:
    result = run()
    assert result.returncode == 2
    assert "no CUDA device is available" in result.stderr
    assert result.stdout.splitlines()[-1].startswith("verdict: it cannot run here")


@pytest.mark.parametrize(
    "arguments",
    [("--device",), ("--device", "tpu"), ("--fast", "yes"), ("--limit", "soon"), ("--site",)],
)
def test_arguments_that_it_does_not_know_are_refused(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("usage: ")


def test_a_folder_for_vllm_that_does_not_exist_is_named(tmp_path: Path) -> None:
    result = run("--site", str(tmp_path / "nowhere"))
    assert result.returncode == 2
    assert result.stderr.startswith(f"--site {tmp_path}/nowhere: no such folder")


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
    # Bug caught: every test skipped, but exit status 0 and a good verdict.
    shutil.copy(ROOT / "tests/conftest.py", tmp_path)
    (tmp_path / "test_one.py").write_text(ONE_TEST.format(body=body))
    found = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])  # what conftest.py imports
    env = {**os.environ, "VLLM_DFLOAT_REQUIRE_GPU": "1", "PYTHONPATH": found}
    options = ["-c", os.devnull, "--rootdir", str(tmp_path), "-p", "no:cacheprovider"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", *options, str(tmp_path)],
        env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == status, result.stdout
    assert ("proves nothing" in result.stdout) == ("skip" in body)
