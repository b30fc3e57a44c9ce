"""The serving benchmark, rehearsed on a CPU with real engines; it reports no time that is not allowed."""

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_serve
import pytest
import tiny_models
from bench.serve import engine as bench_serve_engine
from bench.serve import launch as bench_serve_launch
from conftest import Checkpoint

SCRIPT = Path(bench_serve.__file__)
# Few and short points; the models of these tests have 256 positions.
SHORT = ["--eager", "--runs=1", "--batches=1,3", "--context=8", "--prefill=64", "--hold=100"]
SHORT += ["--steps=6", "--max-seqs=4", "--point-seconds=0.01"]
SHORT += ['--engine={"max_num_batched_tokens": 256}']  # a CPU engine warms up with that many
ONE_THREAD = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
Change = Callable[[str, dict[str, Any]], None]


def launcher(change: Change, order: list[str]) -> bench_serve.Launch:
    """Return a launch function that runs real engines in this process, after `change` has edited the request."""

    def launch(request: dict[str, Any], folder: Path, name: str) -> dict[str, Any]:
        order.append(name)
        change(name, request)
        return bench_serve_engine.measure(request, lambda result: None)

    return launch


@pytest.mark.engine
@pytest.mark.on_demand
def test_rehearsal_writes_a_table_a_report_and_plots_and_says_that_it_is_one(
    tmp_path: Path,
) -> None:
    output = tmp_path / "new" / "report.json"
    command = [sys.executable, str(SCRIPT), "--shape", "tiny", "--folder", str(tmp_path / "tiny")]
    done = subprocess.run(
        [*command, *SHORT, "--output", str(output)],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **ONE_THREAD},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("REHEARSAL ON A CPU")
    assert "DFloat11 fused: needs a GPU" in done.stdout
    assert "BF16 + CPU offload: needs a GPU" in done.stdout
    report = json.loads(output.read_text())
    assert report["is_rehearsal"]
    assert report["machine"]["versions"]["vllm"].startswith("0.")
    assert report["machine"]["versions"]["torch"]
    plain, exact, *others = report["variants"].values()
    assert all(other["not_run"].startswith("needs a GPU") for other in others)
    assert exact["equal_to_bf16"] == {"of": 256, "tokens": 256, "logprobs": 256}
    assert exact["memory"]["held_bytes"] < 0.75 * plain["memory"]["held_bytes"]
    for variant in (plain, exact):
        assert [point["kind"] for point in variant["points"]] == [
            "decode",
            "decode",
            "prefill",
            "capacity",
        ]
        assert all(0 < p["low"] <= p["ms"] <= p["high"] for p in variant["points"])
        assert variant["points"][-1]["batch"] == 4  # --max-seqs: the KV cache would hold more
    check_plots(output.with_suffix(".png"))


def check_plots(path: Path) -> None:
    """Assert a PNG of six panels, each with marks in the colours of BF16 and exact."""
    import numpy as np
    from bench.serve.plot import COLOURS
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    image = imread(path)[:, :, :3]
    height, width, _ = image.shape
    assert height >= 900
    assert width >= 1500
    panels = [
        image[row * height // 2 : (row + 1) * height // 2, col * width // 3 :][:, : width // 3]
        for row in range(2)
        for col in range(3)
    ]
    for number, panel in enumerate(panels):
        for name in ("bf16", "exact"):
            is_mark = np.abs(panel - np.array(to_rgb(COLOURS[name]))).max(axis=2) < 0.02
            assert is_mark.sum() > 50, f"panel {number}: nothing of {name}"
        assert 0.5 < (panel.min(axis=2) > 0.99).mean() < 0.99, f"panel {number}: blank, or covered"


@pytest.mark.engine
@pytest.mark.on_demand
def test_tokens_that_differ_end_with_status_1_and_neither_times_nor_files(
    bf16_checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_models.save("llama", tmp_path / "other", seed=7)

    def change(name: str, request: dict[str, Any]) -> None:
        request["deadline"] = 0  # only the comparison matters here
        if name == "exact-1":
            request["model"] = str(other)

    order: list[str] = []
    output = tmp_path / "report.json"
    argv = ["--model", str(bf16_checkpoint("llama")), *SHORT, "--output", str(output)]
    assert bench_serve.main(argv, launcher(change, order)) == 1
    out, err = capsys.readouterr()
    assert order == ["bf16-1", "exact-1"]
    assert "DFloat11 exact: token 0 of prompt 0 is " in err
    assert "DIFFERENT" in err
    assert " ms" not in out + err
    assert not list(tmp_path.glob("report*"))


@pytest.mark.engine
@pytest.mark.on_demand
def test_layers_copied_ahead_of_use_are_compared_and_their_buffers_count(
    bf16_checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "report.json"
    argv = ["--model", str(bf16_checkpoint("llama")), *SHORT, "--output", str(output)]
    argv += ["--variants", "bf16,exact,prefetch,exact_prefetch"]
    argv += ["--engine", '{"max_num_batched_tokens": 256, "offload_num_in_group": 4}']
    assert bench_serve.main(argv, launcher(lambda name, request: None, [])) == 0
    assert "BF16 + prefetching offload: needs a GPU" in capsys.readouterr().out
    variants = json.loads(output.read_text())["variants"]
    exact, ahead = (variants[name]["memory"] for name in ("exact", "exact_prefetch"))
    assert variants["exact_prefetch"]["equal_to_bf16"]["tokens"] == 256
    assert exact["buffer_bytes"] == exact["host_bytes"] == 0
    assert 0 < ahead["buffer_bytes"] < ahead["host_bytes"]
    moved = ahead["host_bytes"] - ahead["buffer_bytes"]
    assert ahead["resident_bytes"] == exact["resident_bytes"] - moved


@pytest.mark.engine
@pytest.mark.on_demand
def test_others_go_on_in_alternating_order_when_a_variant_fails_or_the_budget_ends_and_rows_say_why(
    bf16_checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(name: str, request: dict[str, Any]) -> None:
        if name.startswith("official"):
            request["engine"]["additional_config"] = {"dfloat11": {"layout": "no such"}}
        if name.startswith("exact"):
            request["deadline"] = 0  # the budget ends while this engine starts

    order: list[str] = []
    output = tmp_path / "report.json"
    argv = ["--model", str(bf16_checkpoint("llama")), *SHORT, "--output", str(output)]
    argv += ["--variants", "official,exact,bf16", "--runs", "2", "--budget", "5000"]
    assert bench_serve.main(argv, launcher(change, order)) == 0
    assert order == ["bf16-1", "exact-1", "official-1", "exact-2", "bf16-2"]
    out = capsys.readouterr().out
    *gaps, failure = [line for line in out.splitlines() if line.startswith("not run: ")]
    assert gaps == [
        f"not run: DFloat11 exact, {point}: the budget of 5000 s was spent"
        for point in ("decode 1", "decode 3", "prefill", "capacity")
    ]
    assert failure.startswith("not run: DFloat11 official layout: ")
    assert "layout: 'no such'; expected one of packed, fast, dfloat11, auto." in failure
    variants = json.loads(output.read_text())["variants"]
    assert [len(point["median_by_run"]) for point in variants["bf16"]["points"]] == [2] * 4


@pytest.mark.engine
@pytest.mark.on_demand
def test_small_batches_of_every_variant_come_first_and_exact_need_not_be_among_them(
    bf16_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    # Bug caught: the budget spent on prefill of the first engines, and nothing known of the last.
    asked: list[list[str]] = []

    def note(name: str, request: dict[str, Any]) -> None:
        asked.append([name, *(point["kind"] for point in request["points"])])

    output = tmp_path / "report.json"
    argv = ["--model", str(bf16_checkpoint("llama")), *SHORT, "--output", str(output)]
    argv += ["--variants", "fast_exact,bf16", "--decode-first"]
    assert bench_serve.main(argv, launcher(note, [])) == 0
    assert asked == [
        ["bf16-1", "decode", "decode"],
        ["fast_exact-1", "decode", "decode"],
        ["bf16-2", "prefill", "capacity"],
        ["fast_exact-2", "prefill", "capacity"],
    ]
    for variant in json.loads(output.read_text())["variants"].values():
        assert [p["kind"] for p in variant["points"]] == ["decode", "decode", "prefill", "capacity"]
        assert all(point["ms"] > 0 for point in variant["points"])


@pytest.mark.engine
@pytest.mark.on_demand
def test_engines_that_are_forks_of_one_process_answer_as_others(
    bf16_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    output = tmp_path / "report.json"
    argv = ["--model", str(bf16_checkpoint("llama")), *SHORT, "--variants", "bf16,exact", "--fork"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *argv, "--output", str(output), "--logs", f"{output}.tar.gz"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **ONE_THREAD},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    exact = json.loads(output.read_text())["variants"]["exact"]
    assert exact["equal_to_bf16"] == {"of": 256, "tokens": 256, "logprobs": 256}
    with tarfile.open(f"{output}.tar.gz") as logs:
        log = logs.extractfile("./exact-1.log")
        assert log is not None
        assert b"ForkServerProcess" in log.read()


def test_nothing_is_started_after_the_end_of_the_budget(
    bf16_checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    order: list[str] = []
    argv = ["--model", str(bf16_checkpoint("llama")), *SHORT, "--budget", "1e-6"]
    assert bench_serve.main(argv, launcher(lambda name, request: None, order)) == 1
    assert order == []
    assert "BF16 did not run: the budget of 1e-06 s was spent." in capsys.readouterr().err


def test_engine_that_outlives_the_budget_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Bug caught: an engine that hangs while it starts, and blocks the GPU and the benchmark for ever.
    monkeypatch.setattr(bench_serve_launch, "GRACE_SECONDS", 0)
    started = []
    popen = subprocess.Popen

    def note(*args: Any, **settings: Any) -> Any:
        started.append(popen(*args, **settings))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", note)
    request = {"environment": {}, "deadline": 0, "budget": 9}
    result = bench_serve_launch.launch(request, tmp_path, "bf16-1")
    assert result == {
        "points": [],
        "ended": "the budget of 9 s was spent",
        "error": "the budget of 9 s was spent",
    }
    assert started[0].returncode is not None


def test_engine_process_that_dies_is_told_by_its_last_words(tmp_path: Path) -> None:
    request = {"environment": {"PYTHONHOME": str(tmp_path)}, "deadline": 0, "budget": 9}
    result = bench_serve_launch.launch(request, tmp_path, "bf16-1")
    assert result["error"].startswith("the engine's process ended with status 1; it said: ")


REFUSALS = {
    "--batches 0,4": "--batches 0,4: expected whole numbers from 1",
    "--batches 1,x": "--batches 1,x: expected whole numbers from 1",
    "--batches 1,1024": "--batches 1,1024: expected at most 512 (--max-seqs)",
    "--variants bf16,fast": "--variants: unknown 'fast'; expected some of bf16, exact, fused",
    "--variants exact,fused": "--variants exact,fused: without bf16",
    "--variants bf16,offload": "--variants bf16,offload: without exact; expected bf16 and exact",
    "--runs 0": "--runs 0: expected at least 1",
    "--budget -1": "--budget -1.0: expected more than 0 seconds",
    "--gpu-memory 1.5": "--gpu-memory 1.5: expected a share over 0",
    "--output report.txt": "--output report.txt: expected a name that ends in .json",
    "--engine [1]": "--engine [1]: expected a JSON object",
    "--engine {": "--engine {: expected a JSON object",
    "--variants bf16,exact,offload_more": "--variants bf16,exact,offload_more: offload_more takes",
    '--engine {"cpu_offload_gb":1}': '--engine {"cpu_offload_gb":1}: expected no cpu_offload_gb',
    '--engine {"offload_group_size":1}': '--engine {"offload_group_size":1}: expected no offload_g',
    "--shape llama-9": "argument --shape: invalid choice: 'llama-9'",
    "--shape tiny --prefill 20000": "--prefill 20000: expected sequences of at most 16384 tokens",
    "--hold 200": "--hold 200: expected more than 264, for 100 steps",
    "--model /nowhere": "--model: /nowhere/config.json: ",
    "--model /nowhere --shape tiny": "--model and --shape or --folder: ",
    "--output /proc/none/report.json": "--output /proc/none: ",
}


@pytest.mark.parametrize(("argv", "expected"), REFUSALS.items(), ids=list(REFUSALS))
def test_bad_input_is_refused_in_one_line_with_status_2(
    argv: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    order: list[str] = []
    assert bench_serve.main(argv.split(), launcher(lambda name, request: None, order)) == 2
    out, err = capsys.readouterr()
    assert (out, order) == ("", [])
    assert err.startswith("bench_serve: " + expected)
    assert err.count("\n") == 1


def test_compressed_checkpoint_is_refused_because_bf16_vllm_cannot_serve_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert bench_serve.main(["--model", str(tiny_models.official("llama-tiny"))]) == 2
    assert "expected a BF16 checkpoint" in capsys.readouterr().err
