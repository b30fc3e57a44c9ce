"""Every architecture of the table: tokens and all logprobs of BF16 vLLM, from both kinds of files; more with --full."""

import json
from pathlib import Path

import architecture_features
import architectures
import pytest

pytestmark = pytest.mark.engine

NAMES = [
    name if name in architectures.CORE else pytest.param(name, marks=pytest.mark.on_demand)
    for name in architectures.CASES
]
ALWAYS = ("BF16 files", "DFloat11 files")


@pytest.mark.parametrize("name", NAMES)
def test_architecture_answers_as_bf16_vllm(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """With --full also after an update, with a LoRA adapter, and traced, as the record says."""
    folder = architecture_features.prepare(name, tmp_path)
    recorded = json.loads(architectures.RECORD.read_text())[name]
    features = recorded if request.config.getoption("--full") else ALWAYS
    for feature in features:
        found = architecture_features.FEATURES[feature](folder)
        assert found.partition(":")[0] == recorded[feature].partition(":")[0], feature


def test_tables_of_the_documentation_are_those_of_the_tests() -> None:
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    assert architectures.tables() in text
    assert architectures.feature_table() in text
    assert set(architectures.CORE) <= set(architectures.CASES)


def test_record_has_every_architecture_and_nothing_that_differs_from_bf16_vllm() -> None:
    recorded = json.loads(architectures.RECORD.read_text())
    assert set(recorded) == set(architectures.CASES)
    for found in recorded.values():
        assert list(found) == list(architecture_features.FEATURES)
        assert all(result.startswith(("equal", *architectures.WORDS)) for result in found.values())
