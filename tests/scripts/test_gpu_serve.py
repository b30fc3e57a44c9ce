"""The end-to-end run on a GPU, rehearsed without one, and its refusals."""

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **environment}
    command = [ROOT / "scripts/gpu_serve.sh", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)


@pytest.mark.on_demand  # two minutes: with --full, before a GPU is used
def test_rehearsal_serves_every_variant_and_leaves_four_files(tmp_path: Path) -> None:
    arguments = [
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
        "--limit",
        "600",
        "--commit",
        "0123abcd",
    ]
    result = run(*arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1].startswith("verdict: tokens of exact are those of BF16")
    files = ["logs.tar.gz", "serve.json", "serve.log", "serve.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    found = json.loads((tmp_path / "serve.json").read_text())
    assert found["machine"]["commit"] == "0123abcd"
    with tarfile.open(tmp_path / "logs.tar.gz") as logs:
        names = {Path(name).name for name in logs.getnames()}
    assert {f"{variant}-1.log" for variant in found["variants"]} <= names
    counts = re.match(r"auto: (\d+) of (\d+) matrices fast", found["variants"]["auto"]["choice"])
    assert counts is not None
    assert 0.3 * int(counts[2]) <= int(counts[1]) <= 0.5 * int(counts[2])


def test_without_a_gpu_it_says_that_it_cannot_run() -> None:
    result = run()
    assert result.returncode == 2
    assert "no CUDA device is available" in result.stderr
    assert result.stdout.splitlines()[-1].startswith("verdict: it cannot run here")


def test_batch_invariant_rehearsal_is_refused_since_vllm_for_cpus_does_not_start_so() -> None:
    result = run("--invariant", "--device", "cpu")
    assert result.returncode == 2
    assert result.stdout.startswith("verdict: it cannot run here: --invariant --device cpu: ")


def test_site_that_does_not_exist_is_named(tmp_path: Path) -> None:
    result = run("--site", str(tmp_path / "none"))
    assert result.returncode == 2
    assert f"--site {tmp_path}/none: no such folder" in result.stdout


@pytest.mark.parametrize(
    "arguments", [("--device", "tpu"), ("--limit", "soon"), ("--out",), ("--site",)]
)
def test_arguments_that_it_does_not_know_are_refused(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("usage: ")


PYTHON = """#!/bin/bash
here=$(dirname "$0")
case $* in
  *bench_setup.py*) echo '{}' ;;
  *spec.submodule_search_locations*) echo "$here" ;;
  *bench_serve.py* | *bench_online.py*)
    printf '%s\\n' "$@" >"$here/arguments"
    while (($#)); do [[ $1 != --logs ]] || [[ $2 == *.gz ]] || mkdir -p "$2"; shift; done
    ;;
esac
"""


@pytest.mark.parametrize(
    ("arguments", "variants"),
    [
        ([], "bf16,exact,fast_exact,fast_fused,auto"),
        (["--protocol"], "bf16,exact,fast_exact,fast_fused,auto"),
        (["--invariant"], "bf16,fast_fused_exact,fast_exact"),
        (["--protocol", "--invariant"], "bf16,exact,fast_exact,fast_fused_exact,auto"),
        (["--variants", "bf16,exact,fused"], "bf16,exact,fused"),
    ],
)
def test_a_gpu_serves_both_layouts_exact_and_fused_and_auto_unless_others_are_asked_for(
    arguments: list[str], variants: str, tmp_path: Path
) -> None:
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    options = ["--out", str(tmp_path / "out"), *arguments]
    result = run(*options, PYTHON=str(tmp_path / "python"))
    assert result.returncode == 0, result.stdout + result.stderr
    given = (tmp_path / "arguments").read_text().splitlines()
    last = len(given) - 1 - given[::-1].index("--variants")  # the one that counts
    assert given[last + 1] == variants
