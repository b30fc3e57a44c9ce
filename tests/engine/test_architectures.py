"""Every architecture of the table: tokens and all logprobs of BF16 vLLM, from both kinds of files; more with --full."""

import json
from pathlib import Path

import architecture_features
import architectures
import pytest
from engines import answers, bf16_answers

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
        expected = architecture_features.expected_here(recorded[feature])
        assert found.partition(":")[0] == expected, (feature, found)


ON_DEMAND_THROUGH_TRANSFORMERS = (
    "Qwen2MoeForCausalLM", "Glm4MoeForCausalLM", "Ernie4_5_MoeForCausalLM", "Dots1ForCausalLM",
    "DeepseekV3ForCausalLM", "GptOssForCausalLM", "FlexOlmoForCausalLM", "HunYuanMoEV1ForCausalLM", "LlamaForCausalLM",
)  # fmt: skip
THROUGH_TRANSFORMERS = [
    "Qwen3MoeForCausalLM",
    *(pytest.param(name, marks=pytest.mark.on_demand) for name in ON_DEMAND_THROUGH_TRANSFORMERS),
]


@pytest.mark.parametrize("name", THROUGH_TRANSFORMERS)
def test_the_transformers_backend_answers_as_that_of_bf16_vllm(
    name: str, tmp_path: Path, log_lines: list[str]
) -> None:
    """Its experts are of a class of vLLM's, TransformersRoutedExperts, and compressed; or they are named."""
    model = architectures.save_case(name, tmp_path / "m")
    backend = dict(model_impl="transformers")
    assert answers(model, quantization="dfloat11", **backend) == bf16_answers(model, **backend)
    (line,) = [line for line in log_lines if line.startswith("dfloat11: compressed")]
    are_layers_of_vllm = architectures.has_experts(name) and name != "GptOssForCausalLM"
    assert ("of these the experts of" in line) == are_layers_of_vllm
    if name == "GptOssForCausalLM":  # there vLLM leaves Transformers' own experts as they are
        assert "mlp.experts" in line.partition("not compressed")[2]


def test_a_class_of_transformers_makes_checkpoints_after_vllms_backend_has_served_it(
    tmp_path: Path,
) -> None:
    # Bug caught: a test failed if another in its process had served its model, with "vLLM config is not set".
    made = [architectures.save_case("Qwen3MoeForCausalLM", tmp_path / "m")]
    bf16_answers(made[0], model_impl="transformers")
    made.append(architectures.save_case("Qwen3MoeForCausalLM", tmp_path / "again"))
    first, second = ((path / "model.safetensors").read_bytes() for path in made)
    assert first == second


def test_tables_of_the_documentation_are_those_of_the_tests() -> None:
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    assert architectures.tables() in text
    assert architectures.feature_table() in text
    assert architectures.version_table() in text
    assert set(architectures.CORE) <= set(architectures.CASES)


def test_record_has_every_architecture_and_nothing_that_differs_from_bf16_vllm() -> None:
    recorded = json.loads(architectures.RECORD.read_text())
    assert set(recorded) == set(architectures.CASES)
    for version in json.loads(architectures.RECORD_OF_VERSIONS.read_text()).values():
        assert set(version) == set(architectures.CASES)
        assert all(
            r.startswith(("equal", "BF16 vLLM: ")) for v in version.values() for r in v.values()
        )
    for found in recorded.values():
        assert list(found) == list(architecture_features.FEATURES)
        assert all(result.startswith(("equal", *architectures.WORDS)) for result in found.values())
