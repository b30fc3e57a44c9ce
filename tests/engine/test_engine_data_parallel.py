"""Data parallelism beside BF16 vLLM's: each engine answers, and an update reaches all of them or none."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny_models
from conftest import Checkpoint
from engine_pairs import ENVIRONMENT
from engines import run_bounded

SCRIPT = Path(__file__).parents[1] / "data_parallel.py"


@pytest.mark.engine
@pytest.mark.alone
@pytest.mark.on_demand
def test_two_engines_answer_and_are_updated_as_those_of_bf16_vllm(
    bf16_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    first, second = bf16_checkpoint("llama"), tiny_models.save("llama", tmp_path / "second", seed=7)
    damaged = shutil.copytree(second, tmp_path / "damaged")
    tiny_models.edit(damaged, lambda tensors: tensors.pop("model.norm.weight"))
    result = tmp_path / "result.json"
    command = [*map(str, (sys.executable, SCRIPT, first, second, damaged, result))]
    processes = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    run_bounded(command, tmp_path / "log.txt", {**ENVIRONMENT, **processes}, 900)
    found = json.loads(result.read_text())
    ours, bf16 = found["dfloat11"], found["bf16"]
    for when in ("before", "after"):
        assert ours[when] == bf16[when]
        assert ours[when][0] == ours[when][1]
    assert ours["before"] != ours["after"]
    assert "model.norm.weight" in ours["refused"]
    assert ours["still"] == ours["after"]
    assert not any(report["damaged"] for report in ours["checks"])
