"""Speculative decoding beside BF16 vLLM's: the same answers, and as many of the drafted tokens accepted."""

from pathlib import Path
from typing import Any

import draft_models
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


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a target with an LM head of its own, and one whose head is its embedding."""
    folder = tmp_path_factory.mktemp("targets")
    kinds = {"untied": False, "tied": True}
    return {
        name: draft_models.target(folder / name, tie_word_embeddings=tied)
        for name, tied in kinds.items()
    }


def assert_drafts_as_bf16_vllm(
    target: Path, speculative: dict[str, Any], pairs: tuple[tuple[str | None, str | None], ...]
) -> None:
    """Compare answers and counts with BF16 vLLM's, for pairs of quantizations of target and draft."""
    expected = drafted(target, speculative, None)
    _, tokens, accepted = expected[1]
    assert accepted > tokens // 6  # heads that read other weights than theirs predict nothing
    for of_target, of_draft in pairs:
        given = {**speculative, "quantization": of_draft}
        assert drafted(target, given, of_target) == expected, (of_target, of_draft)


# Of the target and of the draft. Bug caught: a compressed draft of a BF16 target ended in an AttributeError.
COMPRESSED = (("dfloat11", "dfloat11"), ("dfloat11", None), (None, "dfloat11"))


@pytest.mark.parametrize("own", ["none", "same", "near"])  # embedding of the draft
@pytest.mark.parametrize("kind", ["untied", "tied"])
@pytest.mark.parametrize("method", ["eagle", "eagle3"])
def test_heads_accept_as_many_tokens_as_those_of_bf16_vllm(
    method: str, kind: str, own: str, targets: dict[str, Path], tmp_path: Path
) -> None:
    head = getattr(draft_models, method)(targets[kind], tmp_path / "head", own)
    assert_drafts_as_bf16_vllm(targets[kind], dict(method=method, model=str(head)), COMPRESSED)


def test_head_with_a_smaller_vocabulary_accepts_as_many_tokens_as_that_of_bf16_vllm(
    targets: dict[str, Path], tmp_path: Path
) -> None:
    target = targets["untied"]
    head = draft_models.eagle3(target, tmp_path / "head", vocabulary=200)
    assert_drafts_as_bf16_vllm(target, dict(method="eagle3", model=str(head)), COMPRESSED)


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_medusa_heads_accept_as_many_tokens_as_those_of_bf16_vllm(
    kind: str, targets: dict[str, Path], tmp_path: Path
) -> None:
    heads = draft_models.medusa(targets[kind], tmp_path / "heads")
    assert_drafts_as_bf16_vllm(targets[kind], dict(method="medusa", model=str(heads)), COMPRESSED)


def test_heads_that_fill_in_masked_tokens_accept_as_many_as_those_of_bf16_vllm(
    tmp_path: Path,
) -> None:
    target = draft_models.target(tmp_path / "m", "qwen3", tie_word_embeddings=False)
    draft_models.followed_by_few(target)
    head = draft_models.dflash(target, tmp_path / "head")
    assert_drafts_as_bf16_vllm(target, dict(method="dflash", model=str(head)), COMPRESSED)


@pytest.mark.parametrize(
    ("method", "config", "reason"),
    [
        (
            "mlp_speculator",
            dict(architectures=["MLPSpeculatorPreTrainedModel"]),
            "not supported for now",
        ),
        ("dspark", dict(architectures=["Qwen3DSparkModel"]), "does not support: dspark"),
    ],
)
def test_drafts_that_bf16_vllm_refuses_are_refused_in_its_words(
    method: str, config: dict[str, Any], reason: str, targets: dict[str, Path], tmp_path: Path
) -> None:
    """MLP speculators are no longer in vLLM; DSpark needs a runner that CPUs do not have."""
    head = tiny_models.save("qwen3", tmp_path / "head", **draft_models.SHAPE, num_hidden_layers=1)
    draft_models.change_config(head, **config)
    speculative = dict(method=method, model=str(head))
    for quantization in (None, "dfloat11"):
        with pytest.raises(ValueError, match=reason):
            drafted(targets["untied"], speculative, quantization)


@pytest.mark.parametrize("name", list(draft_models.WITH_MTP))
def test_blocks_that_predict_a_further_token_are_those_of_bf16_vllm(
    name: str, tmp_path: Path
) -> None:
    target = draft_models.with_mtp(name, tmp_path / "m")
    # The block is a part of the target's checkpoint, and held as the target is.
    assert_drafts_as_bf16_vllm(target, dict(method="mtp"), (("dfloat11", None),))
