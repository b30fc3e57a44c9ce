"""The same promise with two ranks: every rank compresses the slices that vLLM's loaders give it."""

import pytest
import tiny_models
from conftest import Checkpoint
from engine_pairs import Case, answer_pairs
from engines import Answers

pytestmark = [pytest.mark.engine, pytest.mark.alone]

# A pair of engines takes most of a minute, so the rest of the matrix runs on demand.
ALWAYS = [
    Case("qwen2", "traced", tp=2),
    Case("qwen3-tiny-tied", "eager", tp=2),
]
ON_DEMAND = [
    *(Case(name, "eager", tp=2) for name in tiny_models.ARCHITECTURES if name != "qwen3_moe"),
    Case("shipped", "eager", tp=2),
    Case("shipped", "traced", tp=2),
    Case("llama-tiny", "traced", tp=2),
    Case("phi3-tiny-fused", "eager", tp=2),
]


@pytest.fixture(scope="module")
def pairs(
    request: pytest.FixtureRequest,
    bf16_checkpoint: Checkpoint,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[Case, tuple[Answers, Answers]]:
    cases = ALWAYS + (ON_DEMAND if request.config.getoption("--full") else [])
    return answer_pairs(cases, bf16_checkpoint, tmp_path_factory.mktemp("tp"))


@pytest.mark.parametrize("case", ALWAYS + ON_DEMAND, ids=str)
def test_two_ranks_answer_as_two_ranks_of_bf16_vllm(
    case: Case, pairs: dict[Case, tuple[Answers, Answers]]
) -> None:
    if case not in pairs:
        pytest.skip("takes most of a minute: runs with --full")
    compressed, plain = pairs[case]
    assert compressed == plain
