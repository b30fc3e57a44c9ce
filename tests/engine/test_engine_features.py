"""Features of vLLM beside its own BF16: one engine each, many features, equal to the last bit."""

from pathlib import Path
from typing import Any

import features
import pytest
from engine_pairs import TRACED
from engines import engine
from tiny_models import SHIPPED

pytestmark = pytest.mark.engine


def all_of(settings: dict[str, Any], names: list[str], model: Path = SHIPPED) -> dict[str, Any]:
    """Return what an engine gives for each feature; an error is a result too."""
    found: dict[str, Any] = {}
    with engine(model, **features.ENGINE, **settings) as llm:
        for name in names:
            found[name] = features.FEATURES[name](llm)
    return found


def assert_equal(settings: dict[str, Any], names: list[str]) -> None:
    expected = all_of(settings, names)
    found = all_of({"quantization": "dfloat11", **settings}, names)
    assert [name for name in names if found[name] != expected[name]] == []


def test_features_of_generation_give_what_bf16_vllm_gives() -> None:
    assert_equal({}, list(features.FEATURES))


@pytest.mark.on_demand
def test_features_of_a_traced_model_give_what_bf16_vllm_gives() -> None:
    # Prompt embeddings enter a compiled model without its embedding.
    assert_equal(dict(enforce_eager=False, **TRACED), list(features.FEATURES))
