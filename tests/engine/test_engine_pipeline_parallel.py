"""The same promise where each rank holds only some of the layers, or slices of only some of them."""

import pytest
from conftest import Checkpoint
from engine_pairs import Case, answer_pairs
from engines import Answers

pytestmark = [pytest.mark.engine, pytest.mark.alone]

# A tied embedding is on the first stage, and as the LM head on the last.
ALWAYS = [Case("qwen3-tiny-tied", "eager", pp=2)]
ON_DEMAND = [
    Case("qwen3-tiny-tied", "traced", pp=2),
    Case("llama", "eager", pp=2),
    Case("llama-tiny", "eager", pp=2),
    Case("qwen3", "eager", pp=2),
    Case("shipped", "traced", pp=2),
    Case("llama", "eager", tp=2, pp=2),
    Case("qwen3-tiny-tied", "eager", tp=2, pp=2),
    Case("shipped", "traced", tp=2, pp=2),
]


@pytest.fixture(scope="module")
def pairs(
    request: pytest.FixtureRequest,
    bf16_checkpoint: Checkpoint,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[Case, tuple[Answers, Answers]]:
    cases = ALWAYS + (ON_DEMAND if request.config.getoption("--full") else [])
    return answer_pairs(cases, bf16_checkpoint, tmp_path_factory.mktemp("pp"))


@pytest.mark.parametrize("case", ALWAYS + ON_DEMAND, ids=str)
def test_stages_answer_as_stages_of_bf16_vllm(
    case: Case, pairs: dict[Case, tuple[Answers, Answers]]
) -> None:
    if case not in pairs:
        pytest.skip("takes a minute or more: runs with --full")
    compressed, plain = pairs[case]
    assert compressed == plain
