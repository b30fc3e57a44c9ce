"""Speculative decoding beside BF16 vLLM's: the same answers, and as many of the drafted tokens accepted."""

from pathlib import Path
from typing import Any

import features
import pytest
import tiny_models
from conftest import Checkpoint
from engines import PROMPTS, engine

pytestmark = [pytest.mark.engine, pytest.mark.on_demand]

# A draft that reads other weights than its own is not seen in the answers, which the target decides.
COUNTS = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")


def drafted(target: Path, speculative: dict[str, Any], quantization: str | None) -> Any:
    """Return answers with all log-probabilities, and how many tokens were drafted and accepted."""
    config = {"num_speculative_tokens": 3, **speculative}
    settings: dict[str, Any] = dict(speculative_config=config, disable_log_stats=False)
    with engine(target, quantization=quantization, **settings) as llm:
        found = [
            features.generate(
                llm, features.tokens([prompt]), temperature=0, max_tokens=24, ignore_eos=True, detokenize=False
            )
            for prompt in PROMPTS
        ]  # fmt: skip
        metrics = {
            metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")
        }
    return found, [metrics[f"vllm:spec_decode_{name}"] for name in COUNTS]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen3_moe"])  # qwen3 is tied
def test_drafts_of_a_model_are_those_of_bf16_vllm(
    kind: str, bf16_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    target = bf16_checkpoint(kind)
    near = tiny_models.save(kind, tmp_path / "near", num_hidden_layers=1)  # another model
    for draft, accepts in ((target, True), (near, False)):
        speculative = dict(method="draft_model", model=str(draft))
        expected = drafted(target, speculative, None)
        drafts, tokens, accepted = expected[1]
        assert drafts
        assert not accepts or accepted == tokens
        for quantization in (None, "dfloat11"):
            given = {**speculative, "quantization": quantization}
            assert drafted(target, given, "dfloat11") == expected


def test_drafts_from_the_prompt_are_those_of_bf16_vllm(bf16_checkpoint: Checkpoint) -> None:
    speculative = dict(method="ngram", prompt_lookup_max=3)
    target = bf16_checkpoint("llama")
    assert drafted(target, speculative, "dfloat11") == drafted(target, speculative, None)
