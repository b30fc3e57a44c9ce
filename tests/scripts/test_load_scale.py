"""The scripts that measure loading, run as a user runs them: the memory bound holds for one rank of several."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"

pytestmark = pytest.mark.engine


def run(script: str, folder: Path, *options: str) -> tuple[str, dict]:
    command = [sys.executable, str(SCRIPTS / script), "--json", str(folder / "out.json"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize(
    ("checkpoint", "tp"),
    [
        ("official", 2),
        pytest.param("bf16", 2, marks=pytest.mark.on_demand),
        pytest.param("official", 1, marks=pytest.mark.on_demand),
        pytest.param("official", 4, marks=pytest.mark.on_demand),
    ],
)
def test_the_last_rank_loads_within_what_it_holds_two_layers_and_the_scratch(
    checkpoint: str, tp: int, tmp_path: Path
) -> None:
    options = ["--shape", "small", "--tp", str(tp), "--ranks", str(tp - 1)]
    text, result = run("load_scale.py", tmp_path, *options, "--checkpoints", checkpoint)
    (rank,) = result["ranks"]
    assert rank["held_bytes"] < 0.7 * rank["bf16_bytes"]
    # Bug caught: a unit decoded as a whole (118 MiB here), more than the bound allows in addition to a rank's half.
    assert 0.9 * rank["held_bytes"] < rank["peak_bytes"] <= rank["bound_bytes"]
    assert rank["read_bytes"] < 1.02 * rank["file_bytes"]  # nothing is read twice
    assert abs(result["plan"]["held_bytes"] / rank["held_bytes"] - 1) < 0.02
    assert "peak, all 1 layers" in text


@pytest.mark.on_demand
@pytest.mark.parametrize("shares", [[], ["--enable-expert-parallel"]])
def test_a_rank_loads_experts_within_the_same_bound(shares: list[str], tmp_path: Path) -> None:
    options = ["--shape", "small-experts", "--tp", "2", "--ranks", "1", *shares]
    _, result = run("load_scale.py", tmp_path, *options)
    for rank in result["ranks"]:
        assert (
            rank["largest_layer_bytes"] == 64 * 3 * 512 * 1024
        )  # half of the experts, as one layer
        assert 0.9 * rank["held_bytes"] < rank["peak_bytes"] <= rank["bound_bytes"]
        assert abs(result["plan"]["held_bytes"] / rank["held_bytes"] - 1) < 0.02
    assert [rank["checkpoint"] for rank in result["ranks"]] == ["bf16", "official"]


@pytest.mark.on_demand
def test_load_times_are_measured_side_by_side(tmp_path: Path) -> None:
    text, result = run("bench_load.py", tmp_path, "--shape", "tiny", "--runs", "1")
    assert result["same_bytes"]
    assert [line.split("  ")[0] for line in text.splitlines()[-3:]] == [
        "BF16 vLLM",
        "compressed while loading",
        "official checkpoint",
    ]
