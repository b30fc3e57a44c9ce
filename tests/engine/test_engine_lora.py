"""LoRA adapters over compressed weights: mixed in a batch, on tied, fused and biased layers, embeddings, LM heads."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import architectures
import lora_adapters
import pytest
import tiny_models
from conftest import Checkpoint
from engine_pairs import TRACED
from engines import engine

from vllm_dfloat.device.scratch import scratch
from vllm_dfloat.integration.layers import head_op, proof_cache
from vllm_dfloat.kernels import configs

pytestmark = pytest.mark.engine

TARGETS: dict[str, tuple[str, ...]] = {
    "linear layers": (),
    "attention": ("q_proj", "v_proj", "qkv_proj"),
    "embedding": ("embed_tokens",),
    "LM head": ("lm_head",),
}
TOGETHER = {  # adapters of one request each; more than an engine has places for replace each other
    "two mixed": ("linear layers", "other"),
    "two mixed, others": ("attention", "embedding"),
    "LM head": ("LM head",),
    "the first again": ("linear layers",),
}


@pytest.fixture
def adapters(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Path]:
    checkpoint: Checkpoint = request.getfixturevalue("bf16_checkpoint")
    model = checkpoint(request.getfixturevalue("name"))
    made = {
        target: lora_adapters.save(model, tmp_path / target.replace(" ", "_"), seed, names)
        for seed, (target, names) in enumerate(TARGETS.items())
    }
    return {**made, "other": lora_adapters.save(model, tmp_path / "other", 99)}


def answers(llm: Any, adapters: dict[str, Path]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, together in TOGETHER.items():
        try:
            found[name] = lora_adapters.ask(llm, *(adapters[one] for one in together))
        except ValueError as error:  # some models' embeddings take no adapter
            found[name] = str(error)
            # Bug caught: BF16 vLLM keeps the requests of the failed step, and then waits for them without end.
            engine = llm.llm_engine
            engine.abort_request([*engine.output_processor.request_states], internal=True)
    return found


IN_FAST_BLOCKS = dict(
    additional_config={"dfloat11": {"layout": "fast", "granularity": "block"}}
)  # fmt: skip
CASES = [
    ("qwen3", {}),  # tied: the LM head is the embedding
    *(
        pytest.param(name, settings, marks=pytest.mark.on_demand)
        for name, settings in [
            ("llama", {}),
            ("phi3", {}),  # fused on disk
            ("qwen2", {}),  # biases
            ("qwen3", dict(enforce_eager=False, **TRACED)),
            ("qwen3", IN_FAST_BLOCKS),
            ("phi3", dict(enforce_eager=False, **TRACED, **IN_FAST_BLOCKS)),
        ]
    ),
]


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_adapters_give_what_bf16_vllm_gives(
    name: str, settings: dict[str, Any], adapters: dict[str, Path], bf16_checkpoint: Checkpoint
) -> None:
    settings = {**settings, **lora_adapters.ENGINE}
    with engine(bf16_checkpoint(name), **settings) as llm:
        expected = answers(llm, adapters)
    with engine(bf16_checkpoint(name), quantization="dfloat11", **settings) as llm:
        assert answers(llm, adapters) == expected
    for found in expected.values():  # an adapter that changes no answer would prove nothing
        assert isinstance(found, str) or all(answer != found[0] for answer in found[1:])
    assert not isinstance(expected["the first again"], str)


@pytest.mark.on_demand
def test_an_lm_head_that_is_the_embedding_in_loras_wrapper_is_multiplied(tmp_path: Path) -> None:
    # Bug caught: Cohere with --enable-lora failed with "its weight was replaced from outside".
    model = architectures.save_case("CohereForCausalLM", tmp_path / "m")
    adapter = lora_adapters.save(model, tmp_path / "adapter", 3)
    with engine(model, **lora_adapters.ENGINE) as llm:
        expected = lora_adapters.ask(llm, adapter)
    with engine(model, quantization="dfloat11", **lora_adapters.ENGINE) as llm:
        assert lora_adapters.ask(llm, adapter) == expected


@pytest.mark.on_demand
@pytest.mark.parametrize("layout", ["packed", "fast"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])  # own and tied
def test_adapters_on_a_head_in_slabs_give_what_bf16_vllm_gives(
    name: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    monkeypatch.setattr(proof_cache, "folder", lambda: tmp_path / "proofs")
    scratch.release()
    head_op.known.clear()
    model = tiny_models.save(name, tmp_path / "model", vocab_size=2048, intermediate_size=512)
    made = {
        target: lora_adapters.save(model, tmp_path / target.replace(" ", "_"), seed, names)
        for seed, (target, names) in enumerate(TARGETS.items())
    }
    together = ("LM head",), ("linear layers", "LM head"), ("embedding",)
    found = []
    for options in (
        {},
        dict(quantization="dfloat11", additional_config={"dfloat11": {"layout": layout}}),
    ):
        small = configs.override(replace(configs.INTERPRETED, slab_bytes=1))
        with small, engine(model, **options, **lora_adapters.ENGINE) as llm:
            found.append([lora_adapters.ask(llm, *(made[one] for one in at)) for at in together])
    assert found[1] == found[0]
    assert any(" in 2 slabs of 1024 rows" in line for line in log_lines)
    for answers_of in found[0]:
        assert all(answer != answers_of[0] for answer in answers_of[1:])


@pytest.mark.on_demand
@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_new_base_weights_under_adapters_answer_as_an_engine_started_with_them(
    name: str, adapters: dict[str, Path], bf16_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    other = tiny_models.save(name, tmp_path / "model", seed=7)
    with engine(other, **lora_adapters.ENGINE) as llm:
        expected = answers(llm, adapters)
    with engine(bf16_checkpoint(name), quantization="dfloat11", **lora_adapters.ENGINE) as llm:
        assert answers(llm, adapters) != expected
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        assert answers(llm, adapters) == expected
