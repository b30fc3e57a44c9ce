"""The same promise with several ranks: each rank compresses the slices, or the layers, that vLLM's loaders give it."""

import pytest
import tiny_models
from conftest import Checkpoint
from engine_pairs import Case, answer_pairs
from engines import Answers

pytestmark = [pytest.mark.engine, pytest.mark.alone]

# A pair of engines takes some 20 s, so the rest of the matrix runs on demand.
SLICES = [
    Case("qwen2", "traced", tp=2),
    Case("qwen3-tiny-tied", "eager-offload", tp=2),
]
# A tied embedding is on the first stage, and as the LM head on the last.
STAGES = [Case("qwen3-tiny-tied", "eager", pp=2)]
MORE_SLICES = [
    *(Case(name, "eager", tp=2) for name in tiny_models.ARCHITECTURES),
    Case("qwen3_moe", "traced", tp=2),
    Case("shipped", "eager", tp=2),
    Case("shipped", "traced", tp=2),
    Case("qwen3-tiny-tied", "eager", tp=2),
    Case("llama", "traced-offload", tp=2),
    Case("llama-tiny", "traced", tp=2),
    Case("phi3-tiny-fused", "eager", tp=2),
]
MORE_STAGES = [
    Case("qwen3-tiny-tied", "traced", pp=2),
    Case("llama", "eager", pp=2),
    Case("llama-tiny", "eager", pp=2),
    Case("qwen3", "eager", pp=2),
    Case("qwen3_moe", "eager", pp=2),
    Case("shipped", "traced", pp=2),
    Case("llama", "eager", tp=2, pp=2),
    Case("qwen3-tiny-tied", "eager", tp=2, pp=2),
    Case("shipped", "traced", tp=2, pp=2),
]
ALWAYS, ON_DEMAND = SLICES + STAGES, MORE_SLICES + MORE_STAGES


@pytest.fixture(scope="module")
def pairs(
    request: pytest.FixtureRequest,
    bf16_checkpoint: Checkpoint,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[Case, tuple[Answers, Answers]]:
    cases = ALWAYS + (ON_DEMAND if request.config.getoption("--full") else [])
    return answer_pairs(cases, bf16_checkpoint, tmp_path_factory.mktemp("ranks"), forks=True)


@pytest.mark.parametrize(
    "case",
    [*ALWAYS, *(pytest.param(case, marks=pytest.mark.on_demand) for case in ON_DEMAND)],
    ids=str,
)
def test_ranks_answer_as_ranks_of_bf16_vllm(
    case: Case, pairs: dict[Case, tuple[Answers, Answers]]
) -> None:
    compressed, plain = pairs[case]
    assert compressed == plain
