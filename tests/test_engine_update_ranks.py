"""An update that fails on one rank leaves all ranks, and the process of the engine, as they were."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny_models
from conftest import Checkpoint
from engine_pairs import ENVIRONMENT
from engines import run_bounded

SCRIPT = Path(__file__).parent / "update_ranks.py"
PROCESSES = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}


@pytest.mark.engine
@pytest.mark.on_demand
def test_update_that_fails_on_one_rank_is_undone_on_all(
    bf16_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    # Bug caught: one rank serves new weights and another old ones, without a word.
    first, second = bf16_checkpoint("llama"), tiny_models.save("llama", tmp_path / "second", seed=7)
    damaged = shutil.copytree(second, tmp_path / "damaged")
    tiny_models.edit(damaged, lambda tensors: tensors.pop("model.norm.weight"))
    result = tmp_path / "result.json"
    command = [sys.executable, str(SCRIPT), *map(str, (first, second, damaged, result))]
    run_bounded(command, tmp_path / "log.txt", {**ENVIRONMENT, **PROCESSES}, 600)
    found = json.loads(result.read_text())
    assert "model.norm.weight" in found["damaged"]
    assert "rank 1 lost the trainer" in found["one rank"] + (tmp_path / "log.txt").read_text()
    assert found["before"] == found["after damaged"] == found["after one rank"]
    assert found["after reload"] == found["bf16"]
