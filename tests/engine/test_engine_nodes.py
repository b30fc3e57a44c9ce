"""The same promise with the ranks on two nodes, in both of vLLM's ways: through Ray, and with --nnodes.

Both nodes are this machine: two Ray nodes, or two `vllm serve` that communicate over the loopback interface.
"""

import json
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import ray_engines
from conftest import Checkpoint
from engine_pairs import ENVIRONMENT, TRACED, Case, answer_pairs
from engines import Answers
from servers import complete, free_port, server, wait_until_ready
from tiny_models import SHIPPED

pytestmark = [pytest.mark.engine, pytest.mark.alone, pytest.mark.on_demand]

RAY = [Case("llama", "eager", tp=2), Case("qwen3-tiny-tied", "eager", pp=2)]


@pytest.fixture(scope="module")
def pairs(
    bf16_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> dict[Case, tuple[Answers, Answers]]:
    pytest.importorskip("ray", reason="ray is not installed; see CONTRIBUTING.md")
    folder = tmp_path_factory.mktemp("ray")
    ray_engines.install_platform(folder)
    path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory(prefix="ray-") as short:  # Ray's sockets need a short path
        environment = {
            **ENVIRONMENT,
            "PYTHONPATH": os.pathsep.join(path),
            "RAY_TMPDIR": short,
            "RAY_DEDUP_LOGS": "0",
        }
        return answer_pairs(RAY, bf16_checkpoint, folder, environment, ray_engines.__file__)


@pytest.mark.parametrize("case", RAY, ids=str)
def test_ranks_on_two_ray_nodes_answer_as_those_of_bf16_vllm(
    case: Case, pairs: dict[Case, tuple[Answers, Answers]]
) -> None:
    compressed, plain = pairs[case]
    assert compressed == plain


def completion_of_two_nodes(folder: Path, name: str, *options: str) -> tuple[dict[str, Any], str]:
    """Return the answer of two `vllm serve`, one pipeline stage each, and their logs."""
    options = (
        *("--pipeline-parallel-size", "2", "--distributed-executor-backend", "mp"),
        *("--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port())),
        *("--no-enforce-eager", "--compilation-config", json.dumps(TRACED["compilation_config"])),
        *options,
    )
    logs = folder / f"{name}-0.log", folder / f"{name}-1.log"
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(server(SHIPPED, logs[1], *options, "--node-rank", "1", "--headless"))
        url = enter(server(SHIPPED, logs[0], *options, "--node-rank", "0"))
        wait_until_ready(url, logs[0])
        given = complete(url)
    return given, "".join(log.read_text() for log in logs)


def test_two_servers_answer_as_two_bf16_servers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_HOST_IP", "127.0.0.1")
    compressed, log = completion_of_two_nodes(tmp_path, "ours", "--quantization", "dfloat11")
    plain, _ = completion_of_two_nodes(tmp_path, "bf16")
    assert len(plain["token_ids"]) == 12
    assert compressed == plain
    assert log.count("dfloat11: compressed 9 of 9 layers") == 2  # two blocks and an embedding
