"""The same promise with two ranks: every rank compresses the slices that vLLM's loaders give it."""

from pathlib import Path

import pytest
import tiny_models
from conftest import Checkpoint
from engines import Answers, answers_elsewhere

pytestmark = [pytest.mark.engine, pytest.mark.alone]

ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two ranks on one NUMA node
    "VLLM_CPU_CI_ENV": "1",  # Dynamo traces, without Inductor's C++ compiles
}
OFFICIAL = {"qwen3-tiny-tied", "llama-tiny", "phi3-tiny-fused"}
# (model, mode). A pair of engines takes most of a minute, so the rest of the matrix runs on demand.
ALWAYS = [
    ("qwen2", "traced"),
    ("qwen3-tiny-tied", "eager"),
]
ON_DEMAND = [
    *((name, "eager") for name in tiny_models.ARCHITECTURES if name != "qwen3_moe"),
    ("shipped", "eager"),
    ("shipped", "traced"),
    ("llama-tiny", "traced"),
    ("phi3-tiny-fused", "eager"),
]


@pytest.fixture(scope="module")
def pairs(
    request: pytest.FixtureRequest,
    bf16_checkpoint: Checkpoint,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[tuple[str, str], tuple[Answers, Answers]]:
    """Run all engines in one process, because only its first one pays for vLLM's import."""
    cases = ALWAYS + (ON_DEMAND if request.config.getoption("--full") else [])
    given = []
    for name, mode in cases:
        plain = tiny_models.SHIPPED if name == "shipped" else bf16_checkpoint(name)
        settings = dict(tensor_parallel_size=2, enforce_eager=mode == "eager")
        given.append(dict(model=str(plain), **settings))
        if name in OFFICIAL:
            given.append(dict(model=str(tiny_models.official(name)), **settings))
        else:
            given.append(dict(model=str(plain), quantization="dfloat11", **settings))
    folder = tmp_path_factory.mktemp("tp")
    results = answers_elsewhere(given, folder, ENVIRONMENT, timeout=120 * len(given))
    assert_both_ranks_compressed(folder / "log.txt", num_engines=len(cases))
    return dict(zip(cases, zip(results[::2], results[1::2], strict=True), strict=True))


def assert_both_ranks_compressed(log: Path, num_engines: int) -> None:
    lines = [line for line in log.read_text().splitlines() if "dfloat11: compressed" in line]
    assert len(lines) == 2 * num_engines, lines


@pytest.mark.parametrize(("name", "mode"), ALWAYS + ON_DEMAND)
def test_two_ranks_answer_as_two_ranks_of_bf16_vllm(
    name: str, mode: str, pairs: dict[tuple[str, str], tuple[Answers, Answers]]
) -> None:
    if (name, mode) not in pairs:
        pytest.skip("takes most of a minute: runs with --full")
    plain, compressed = pairs[name, mode]
    assert compressed == plain
