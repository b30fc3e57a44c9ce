"""Data-parallel ranks that share experts, as processes: each holds its own, with the bits of a rank of BF16 vLLM."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import architectures
import pytest

TESTS = Path(__file__).parents[1]

pytestmark = [pytest.mark.engine, pytest.mark.on_demand]


def test_each_of_two_data_parallel_ranks_holds_its_own_experts(tmp_path: Path) -> None:
    model = architectures.save_case("Qwen3MoeForCausalLM", tmp_path / "m")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    answers = [tmp_path / f"{rank}.json" for rank in range(2)]
    script = [sys.executable, str(TESTS / "expert_ranks.py"), str(model)]
    ranks = [
        subprocess.Popen([*script, str(rank), port, str(answer)], env=env)
        for rank, answer in enumerate(answers)
    ]
    assert [rank.wait(timeout=600) for rank in ranks] == [0, 0]
    for answer, experts in zip(answers, ([0, 1], [2, 3]), strict=True):
        bf16, compressed = json.loads(answer.read_text())
        assert bf16["experts"] == compressed["experts"] == experts
        assert bf16["bits"] == compressed["bits"]
        assert (bf16["compressed"], compressed["compressed"]) == (0, 2)
