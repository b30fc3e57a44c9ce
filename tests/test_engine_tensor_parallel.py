"""The same promise with two ranks: every rank compresses the slices that vLLM's loaders give it."""

from pathlib import Path

import pytest
import tiny_models
from conftest import Checkpoint
from engines import Answers, answers_elsewhere

pytestmark = pytest.mark.engine

ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two ranks on one NUMA node
    "VLLM_CPU_CI_ENV": "1",  # Dynamo traces, without Inductor's C++ compiles
}
CASES = ["bf16 checkpoint with biases, traced", "official checkpoint with tied embeddings, eager"]


@pytest.fixture(scope="module")
def pairs(
    bf16_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Answers, Answers]]:
    """Run all engines in one process, because only its first one pays for vLLM's import."""
    compressed = dict(quantization="dfloat11")
    runs = [
        (bf16_checkpoint("qwen2"), dict(enforce_eager=False)),
        (bf16_checkpoint("qwen2"), dict(enforce_eager=False, **compressed)),
        (bf16_checkpoint("qwen3-tiny-tied"), {}),
        (tiny_models.official("qwen3-tiny-tied"), {}),
    ]
    folder = tmp_path_factory.mktemp("tp")
    given = [dict(model=str(model), tensor_parallel_size=2, **settings) for model, settings in runs]
    results = answers_elsewhere(given, folder, ENVIRONMENT, timeout=600)
    assert_both_ranks_compressed(folder / "log.txt", num_engines=2)
    return dict(zip(CASES, zip(results[::2], results[1::2], strict=True), strict=True))


def assert_both_ranks_compressed(log: Path, num_engines: int) -> None:
    lines = [line for line in log.read_text().splitlines() if "dfloat11: compressed" in line]
    assert len(lines) == 2 * num_engines, lines


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_answer_as_two_ranks_of_bf16_vllm(
    case: str, pairs: dict[str, tuple[Answers, Answers]]
) -> None:
    plain, compressed = pairs[case]
    assert compressed == plain
