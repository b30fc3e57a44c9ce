"""Layers held in the fast layout: the same answers as BF16 vLLM, to the last bit; with mode fused nearly the same."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import tiny_models
import torch
from conftest import Checkpoint
from engines import Answers, answers, ask, bf16_answers, engine

from vllm_dfloat.device.fast_ops import FastWeight
from vllm_dfloat.integration.layers import layouts
from vllm_dfloat.integration.layers.method import packed_of

pytestmark = pytest.mark.engine


def fast(**options: Any) -> dict[str, Any]:
    return dict(
        quantization="dfloat11", additional_config={"dfloat11": {"layout": "fast", **options}}
    )


def test_engine_with_layout_auto_answers_as_bf16_vllm_and_packs_what_is_not_multiplied_by(
    bf16_checkpoint: Checkpoint, log_lines: list[str]
) -> None:
    model = bf16_checkpoint("llama")
    auto = {**fast(), "additional_config": {"dfloat11": {"layout": "auto", "kv_tokens": 1000}}}
    assert answers(model, **auto) == bf16_answers(model)
    told = "dfloat11: auto: 9 of 10 matrices fast, the others packed, which should leave 1,000 tokens of KV cache"
    assert any(line.startswith(told) for line in log_lines)
    (line,) = [line for line in log_lines if line.startswith("dfloat11: compressed")]
    assert "compressed 10 of 10 layers (9 in the fast layout with 12." in line


def spread(weight: torch.Tensor) -> torch.Tensor:
    """Return small weights of 50 exponents, which the fast layout cannot shrink and the packed one can."""
    generator = torch.Generator().manual_seed(1)
    exponents = torch.randint(-60, -9, weight.shape, generator=generator)
    return (torch.randn(weight.shape, generator=generator).sign() * 2.0**exponents).bfloat16()


@pytest.mark.parametrize(
    ("enforce_eager", "granularity"),
    [
        (True, "block"),
        pytest.param(True, "auto", marks=pytest.mark.on_demand),
        pytest.param(False, "auto", marks=pytest.mark.on_demand),
        pytest.param(False, "block", marks=pytest.mark.on_demand),
    ],
)
def test_matrix_that_would_not_shrink_is_packed_and_stays_so_when_reloaded(
    enforce_eager: bool,
    granularity: str,
    tmp_path: Path,
    log_lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not enforce_eager:
        monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")
    name, other = "model.layers.1.mlp.down_proj", "model.layers.0.mlp.down_proj"
    first, second = (
        tiny_models.edit(
            tiny_models.save("qwen2", tmp_path / which),  # with biases
            lambda tensors, which=which: tensors.update(
                {f"{which}.weight": spread(tensors[f"{which}.weight"])}
            ),
        )
        for which in (name, other)
    )
    mode = dict(enforce_eager=enforce_eager)
    expected = [bf16_answers(model, **mode) for model in (first, second)]
    with engine(first, **fast(granularity=granularity), **mode) as llm:
        assert ask(llm) == expected[0]
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(second)})
        # Bug caught: graphs that name one layout, and a reloaded layer that has another.
        after = ask(llm)
        model = llm.llm_engine.model_executor.driver_worker.get_model()
        held = {w.name: w for layer in model.modules() if (w := packed_of(layer)) is not None}
        assert [key for key, weight in held.items() if not isinstance(weight, FastWeight)] == [name]
    assert after == expected[1]
    (line,) = [line for line in log_lines if line.startswith("dfloat11: compressed")]
    assert "compressed 10 of 10 layers (9 in the fast layout with 12." in line
    assert ", 1 in the packed layout with 1" in line
    told = "held in the packed layout, since in the fast one they would take 14 bits per weight or more: "
    assert f"dfloat11: {told}{name}" in log_lines


@pytest.mark.on_demand
@pytest.mark.parametrize("enforce_eager", [True, False])
@pytest.mark.parametrize("name", ["llama-tiny", "phi3-tiny-fused", "qwen3-tiny-tied"])
@pytest.mark.parametrize(
    "options",
    [
        dict(layout="fast"),
        dict(layout="fast", granularity="block"),
        dict(layout="auto", kv_tokens=500, granularity="block"),
        dict(layout="fast", mode="fused-exact"),
    ],
    ids=str,
)
def test_official_checkpoint_held_in_the_fast_layout_answers_as_bf16_vllm(
    options: dict[str, Any],
    name: str,
    enforce_eager: bool,
    bf16_checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not enforce_eager:
        monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")
    given = dict(enforce_eager=enforce_eager, additional_config={"dfloat11": options})
    expected = bf16_answers(bf16_checkpoint(name), enforce_eager=enforce_eager)
    assert answers(tiny_models.official(name), **given) == expected


def largest_difference(a: Answers, b: Answers) -> float:
    """Return the largest difference of logprobs of the prompt and the first token."""
    rows = [
        pair
        for one, other in zip(a, b, strict=True)
        for key in ("prompt_logprobs", "logprobs")
        for pair in [*zip(one[key], other[key], strict=True)][: None if key[0] == "p" else 1]
    ]
    return max(
        abs(x - y) for left, right in rows for (_, x), (_, y) in zip(left, right, strict=True)
    )


@pytest.mark.on_demand
def test_fused_engine_answers_nearly_as_bf16_vllm_and_always_the_same(
    tmp_path: Path, log_lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = dict(num_hidden_layers=1, hidden_size=128, intermediate_size=128, head_dim=64)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, vocab_size=64)
    model = tiny_models.save("qwen2", tmp_path, **heads, **shape)
    product = layouts.BY_NAME["fast"].product
    assert product is not None
    multiplied: list[int] = []

    def watched(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        multiplied.append(x.shape[0])
        return product.launch(x, *arguments)

    held = replace(layouts.BY_NAME["fast"], product=replace(product, launch=watched))
    prompts = [[5, 9, 3, 7, 11]]  # 5 rows of activations, then 1: one for each of the two forms
    few = dict(max_num_batched_tokens=8, max_num_seqs=1)  # few rows in vLLM's own passes
    with engine(model, **few) as llm:
        expected = ask(llm, prompts, num_tokens=2)
    monkeypatch.setenv("VLLM_DFLOAT_BACKEND", "triton")
    monkeypatch.setitem(cast(dict[str, layouts.Layout], layouts.BY_NAME), "fast", held)
    with engine(model, **fast(mode="fused"), **few) as llm:
        multiplied.clear()
        first = ask(llm, prompts, num_tokens=2)
        assert multiplied.count(5) >= 4  # every linear layer
        assert multiplied.count(1) >= 4
        assert ask(llm, prompts, num_tokens=2) == first
    assert "dfloat11: fused for up to 256 rows of activations in 6 of 6 layers" in log_lines
    # Logits of this model are of size 1, and BF16 has 8 bits; a wrong weight gives differences of size 1.
    assert largest_difference(first, expected) < 0.1


@pytest.mark.on_demand
def test_engine_in_mode_fused_exact_answers_as_bf16_vllm_where_nothing_is_proven(
    tmp_path: Path, log_lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = dict(num_hidden_layers=1, hidden_size=128, intermediate_size=128, head_dim=64)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, vocab_size=64)
    model = tiny_models.save("qwen2", tmp_path, **heads, **shape)
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    prompts = [[5, 9, 3, 7, 11]]
    few = dict(max_num_batched_tokens=8, max_num_seqs=1)
    with engine(model, **few) as llm:
        expected = ask(llm, prompts, num_tokens=2)
    monkeypatch.setenv("VLLM_DFLOAT_BACKEND", "triton")
    with engine(model, **fast(mode="fused-exact"), **few) as llm:
        assert ask(llm, prompts, num_tokens=2) == expected
    (line,) = [line for line in log_lines if "fused-exact" in line]
    assert "proven equal to vLLM's GEMM for none of 3 shapes of matrices" in line
