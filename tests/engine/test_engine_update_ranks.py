"""Updates of an engine whose ranks are separate processes, as in production: the caller gets a refused one's error."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from conftest import Checkpoint
from engine_pairs import ENVIRONMENT
from engines import run_bounded

SCRIPT = Path(__file__).parents[1] / "update_ranks.py"
PROCESSES = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
REFUSED = {
    "damaged path": "model.norm.weight",
    "reload, first rank": "rank 0 lost the trainer",
    "reload, last rank": "lost the trainer",
    "read, last rank": "No such file",
    "transfer, shape": "o_proj.weight [3]: could not be loaded",
    "transfer, last rank": "lost the trainer",
}
WAYS = ("path", "transfer", "method")


def updated(num_ranks: int, bf16_checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    """Return what happened in an engine of `num_ranks` ranks."""
    first, second = bf16_checkpoint("llama"), tiny_models.save("llama", folder / "second", seed=7)
    damaged = shutil.copytree(second, folder / "damaged")
    tiny_models.edit(damaged, lambda tensors: tensors.pop("model.norm.weight"))
    result = folder / "result.json"
    command = [sys.executable, SCRIPT, first, second, damaged, num_ranks, result]
    run_bounded([*map(str, command)], folder / "log.txt", {**ENVIRONMENT, **PROCESSES}, 600)
    return json.loads(result.read_text())


@pytest.mark.engine
@pytest.mark.alone
@pytest.mark.on_demand
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_update_takes_effect_on_all_ranks_or_on_none_and_the_caller_learns_why(
    num_ranks: int, bf16_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    # Bugs caught: one rank serves new weights and another old ones; the error only refers to another rank's message;
    # after a refused update vLLM takes the replies of all ranks but the first for replies to the next call.
    found = updated(num_ranks, bf16_checkpoint, tmp_path)
    for name, words in REFUSED.items():
        assert words in found["refused"].get(name, "it was not refused"), name
        assert [report["rank"] for report in found["replies"][name]] == list(range(num_ranks))
        assert not any(report["damaged"] for report in found["replies"][name])
    assert found["after"] == dict.fromkeys([*REFUSED, *WAYS], "as before")
    assert all(found[way] == found["bf16"] for way in WAYS)
