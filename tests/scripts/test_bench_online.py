"""The benchmark that asks servers, rehearsed on a CPU with real ones; bad input; what is made of nvidia-smi's lines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import bench_online
import pytest
from bench.online.server import flags, write_tokenizer
from bench.online.watch import summarize

ROOT = Path(__file__).parents[2]


@pytest.mark.engine
@pytest.mark.on_demand
def test_rehearsal_of_the_published_protocol_measures_bf16_twice_and_writes_json(
    tmp_path: Path,
) -> None:
    env = {
        **os.environ,
        "PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        ROOT / "scripts/gpu_serve.sh",
        "--protocol",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ]
    command += ["--limit", "600"]
    done = subprocess.run(
        command,
        env=env | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    files = ["logs.tar.gz", "serve.json", "serve.log"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    results = json.loads((tmp_path / "serve.json").read_text())["results"]
    assert [result["variant"] for result in results] == ["bf16", "exact", "bf16"]
    for result in results:
        assert result["kv_cache_tokens"] > 0
        assert [found["rate"] for found in result["rates"]] == ["4", "inf"]
        for found in result["rates"]:
            assert found["completed"] == 6
            assert found["p99_ttft_ms"] >= found["mean_ttft_ms"] > 0
            assert found["p99_tpot_ms"] >= found["mean_tpot_ms"] > 0
            assert "--ignore-eos" in found["command"]


REFUSALS = {
    "--variants bf16,speed": "--variants: 'speed'; expected some of bf16, exact",
    "--variants offload": "--variants: 'offload'; expected some of",
    "--rates 1,fast --folder x": "--rates 1,fast: expected numbers over 0, or inf",
    "--rates 0 --folder x": "--rates 0: expected numbers over 0, or inf",
    "--shape tiny": "--folder: missing",
    "--folder x --engine [1]": "--engine [1]: expected a JSON object",
    "--model /nowhere": "--model: /nowhere/config.json: ",
}


@pytest.mark.parametrize(("argv", "expected"), REFUSALS.items(), ids=list(REFUSALS))
def test_bad_input_is_refused_in_one_line_with_status_2(
    argv: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_online.main(argv.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("bench_online: " + expected)
    assert err.count("\n") == 1


def test_bf16_is_first_and_once_more_at_the_end_whatever_is_asked_for() -> None:
    args = bench_online.checked(["--folder", "x", "--variants", "exact,bf16,fused"])
    assert args.names == ["bf16", "exact", "fused", "bf16"]
    args = bench_online.checked(["--folder", "x", "--seconds", "20", "--prompts", "64"])
    assert [bench_online.prompts_of(rate, args) for rate in ("0.01", "1", "4", "inf")] == [
        1,
        20,
        64,
        64,
    ]


def test_settings_of_an_engine_become_arguments_of_the_server() -> None:
    settings = {"max_model_len": 64, "enforce_eager": True, "enable_prefix_caching": False}
    config = {"additional_config": {"dfloat11": {"layout": "fast"}}}
    assert flags(settings | config) == [
        "--max-model-len", "64", "--enforce-eager", "--no-enable-prefix-caching", "--additional-config",
        '{"dfloat11": {"layout": "fast"}}',
    ]  # fmt: skip


def test_clock_and_power_are_means_of_the_lines_that_hold_numbers() -> None:
    assert summarize("1980, 600.5\n[N/A], 1\n1000, 400.5\n19") == {"mhz": 1490, "watts": 500}
    assert summarize("") == {}


def test_tokenizer_for_random_weights_gives_as_many_tokens_as_words(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path, 512)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = [511, 0, 7, 7]
    assert tokenizer(tokenizer.decode(ids))["input_ids"] == ids
