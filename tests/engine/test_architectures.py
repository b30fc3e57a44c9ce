"""Every architecture of the table: tokens and all logprobs of BF16 vLLM, from BF16 and from DFloat11 files."""

import math
from pathlib import Path

import architectures
import pytest
from engines import Answers, answers, bf16_answers

from vllm_dfloat.convert.compress import compress
from vllm_dfloat.convert.source import open_source

pytestmark = pytest.mark.engine

NAMES = [
    name if name in architectures.CORE else pytest.param(name, marks=pytest.mark.on_demand)
    for name in architectures.CASES
]


def is_number(found: Answers) -> bool:
    """Return whether there is no NaN, which equals nothing and hides everything behind it."""
    positions = [position for answer in found for position in answer["logprobs"]]
    return all(not math.isnan(value) for position in positions for _, value in position)


@pytest.mark.parametrize("name", NAMES)
def test_architecture_answers_as_bf16_vllm_from_both_kinds_of_checkpoint(
    name: str, tmp_path: Path, log_lines: list[str]
) -> None:
    model = architectures.save_case(name, tmp_path / "m")
    expected = bf16_answers(model)
    assert is_number(expected)
    assert answers(model, quantization="dfloat11") == expected
    compress(open_source(model), tmp_path / "df11", workers=1)
    assert answers(tmp_path / "df11") == expected
    summaries = [line for line in log_lines if line.startswith("dfloat11: compressed ")]
    assert len(summaries) == 2
    assert all(("of these the experts" in s) == architectures.has_experts(name) for s in summaries)


def test_table_of_the_documentation_is_that_of_the_tests() -> None:
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    assert architectures.tables() in text
    assert set(architectures.CORE) <= set(architectures.CASES)
