"""Groups decoded at once give the bits of BF16 vLLM; small batches multiplied without decoding are nearly equal."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import tiny_models
import torch
from compiled_target import TARGET
from conftest import Checkpoint
from engines import Answers, answers, ask, bf16_answers, engine

from vllm_dfloat.device.scratch import scratch
from vllm_dfloat.integration.layers import layouts, method
from vllm_dfloat.kernels import configs

pytestmark = pytest.mark.engine


def options(**given: Any) -> dict[str, Any]:
    return dict(quantization="dfloat11", additional_config={"dfloat11": given})


BLOCKWISE = options(granularity="block")


@pytest.mark.parametrize(
    ("name", "enforce_eager"),
    [
        ("llama", True),
        ("qwen2", False),
        pytest.param("llama", False, marks=pytest.mark.on_demand),
        pytest.param("qwen2", True, marks=pytest.mark.on_demand),
        pytest.param("phi3", True, marks=pytest.mark.on_demand),
        pytest.param("phi3", False, marks=pytest.mark.on_demand),
    ],
)
def test_engine_that_decodes_whole_blocks_answers_as_bf16_vllm(
    name: str, enforce_eager: bool, bf16_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not enforce_eager:
        monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")  # Dynamo traces, without Inductor's C++ compiles
    model, mode = bf16_checkpoint(name), dict(enforce_eager=enforce_eager)
    assert answers(model, **BLOCKWISE, **mode) == bf16_answers(model, **mode)


def test_every_pass_decodes_every_block_once(
    bf16_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Bug caught: layers that are never grouped; the answers would be the same.
    decoded: list[bool] = []
    take = scratch.take_for_group

    def watched(*arguments: Any) -> Any:
        buffers, is_stale = take(*arguments)
        decoded.append(is_stale)
        return buffers, is_stale

    with engine(bf16_checkpoint("llama"), **BLOCKWISE) as llm:
        monkeypatch.setattr(scratch, "take_for_group", watched)
        ask(llm, num_tokens=3)
        model = llm.llm_engine.model_executor.driver_worker.get_model()
        held = [getattr(layer, method.TABLES, None) for layer in model.modules()]
        tables = {id(table) for table in held if table is not None}
    assert len(tables) == 2  # the layers of a transformer block share a table
    assert decoded == [True, False, False, False] * (len(decoded) // 4)
    assert len(decoded) >= 2 * 3 * 4  # two groups of four layers, three passes


def test_reloaded_engine_decodes_the_new_blocks(
    bf16_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    other = tiny_models.save("llama", tmp_path / "other", seed=7)
    with engine(bf16_checkpoint("llama"), **BLOCKWISE) as llm:
        before = ask(llm)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        after = ask(llm)
    assert after != before
    assert after == bf16_answers(other)


def test_model_of_one_block_is_decoded_in_every_pass(tmp_path: Path) -> None:
    model = tiny_models.save("llama", tmp_path, num_hidden_layers=1)
    assert answers(model, **BLOCKWISE) == bf16_answers(model)


def largest_difference(a: Answers, b: Answers) -> float:
    """Return the largest difference of logprobs of the same prompts, up to the first different token."""
    differences = [0.0]
    for one, other in zip(a, b, strict=True):
        rows = [*zip(one["prompt_logprobs"], other["prompt_logprobs"], strict=True)]
        for step, pair in enumerate(zip(one["logprobs"], other["logprobs"], strict=True)):
            if one["tokens"][:step] == other["tokens"][:step]:
                rows.append(pair)
        for left, right in rows:
            differences += [abs(x - y) for (_, x), (_, y) in zip(left, right, strict=True)]
    return max(differences)


@pytest.fixture(scope="module")
def narrow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the smallest model that the fused kernels take: they run in Triton's interpreter here."""
    shape = dict(num_hidden_layers=1, hidden_size=704, intermediate_size=704, head_dim=64)
    path = tmp_path_factory.mktemp("narrow")
    heads = dict(num_attention_heads=11, num_key_value_heads=1, vocab_size=64)
    return tiny_models.save("qwen2", path, **heads, **shape)


def test_fused_engine_answers_nearly_as_bf16_vllm_and_always_the_same(
    narrow_model: Path, log_lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    multiplied: list[int] = []
    product = layouts.BY_NAME["packed"].product
    assert product is not None
    launch = product.launch

    def watched(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        multiplied.append(x.shape[0])
        return launch(x, *arguments)

    prompts = [[5, 9]]  # 2 rows of activations, then 1
    with engine(narrow_model) as llm:
        expected = ask(llm, prompts, num_tokens=2)
    monkeypatch.setenv("VLLM_DFLOAT_BACKEND", "triton")
    held = replace(layouts.BY_NAME["packed"], product=replace(product, launch=watched))
    monkeypatch.setitem(cast(dict[str, layouts.Layout], layouts.BY_NAME), "packed", held)
    # Few rows in vLLM's own passes, and few programs: the interpreter runs one after the other.
    few = dict(max_num_batched_tokens=4, max_num_seqs=1)
    # Only gate_up has so many rows, 1408.
    by_shape = dict(fused_max_rows=2, fused_large_rows=1408)
    tiles = {} if TARGET else {"fused_gemv_tiles_per_program": 512}
    large = replace(configs.INTERPRETED, **tiles, **by_shape)
    with configs.override(large), engine(narrow_model, **options(mode="fused"), **few) as llm:
        multiplied.clear()
        first = ask(llm, prompts, num_tokens=2)
        assert multiplied.count(2) >= 4  # every linear layer
        assert multiplied.count(1) >= 4
        again = ask(llm, prompts, num_tokens=1)
        assert [again[0][key] for key in again[0]] == [first[0][key][:1] for key in again[0]]
    assert "dfloat11: fused for up to 2 or 4 rows of activations in 6 of 6 layers" in log_lines
    # Logits of this model are of size 1, and BF16 has 8 bits; a wrong weight gives differences of size 1.
    assert largest_difference(first, expected) < 0.1


def test_fused_mode_without_triton_decodes_exactly_and_says_so(
    bf16_checkpoint: Checkpoint, log_lines: list[str]
) -> None:
    model = bf16_checkpoint("llama")
    assert answers(model, **options(mode="fused")) == bf16_answers(model)
    assert (
        "dfloat11: fused for up to 0 rows of activations in 0 of 10 layers; the others are decoded"
        in log_lines
    )
