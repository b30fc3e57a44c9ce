"""Layers held in another layout than the packed one: the answers of BF16 vLLM to the last bit, after a reload too."""

from pathlib import Path
from typing import Any

import pytest
import tiny_models
from conftest import Checkpoint
from engines import answers, ask, bf16_answers, engine

from vllm_dfloat.device.unit_layout import UnitWeight
from vllm_dfloat.integration.layers.method import packed_of

pytestmark = pytest.mark.engine


def held_in(layout: str) -> dict[str, Any]:
    return dict(quantization="dfloat11", additional_config={"dfloat11": {"layout": layout}})


@pytest.mark.parametrize("layout", ["fast", "dfloat11"])
@pytest.mark.parametrize(
    ("name", "enforce_eager"),
    [
        ("llama", False),
        ("qwen3", True),  # tied embeddings
        pytest.param("llama", True, marks=pytest.mark.on_demand),
        pytest.param("qwen3", False, marks=pytest.mark.on_demand),
        pytest.param("qwen3_moe", True, marks=pytest.mark.on_demand),
        pytest.param("qwen3_moe", False, marks=pytest.mark.on_demand),
    ],
)
def test_engine_with_another_layout_answers_as_bf16_vllm(
    layout: str,
    name: str,
    enforce_eager: bool,
    bf16_checkpoint: Checkpoint,
    log_lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not enforce_eager:
        monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")  # Dynamo traces, without Inductor's C++ compiles
    model, mode = bf16_checkpoint(name), dict(enforce_eager=enforce_eager)
    assert answers(model, **held_in(layout), **mode) == bf16_answers(model, **mode)
    (line,) = [line for line in log_lines if line.startswith("dfloat11: compressed")]
    assert f"layers in the {layout} layout, " in line


def test_reloaded_engine_holds_units_again_and_answers_as_one_that_was_started_so(
    bf16_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    other = tiny_models.save("llama", tmp_path / "other", seed=7)
    with engine(bf16_checkpoint("llama"), **held_in("dfloat11")) as llm:
        before = ask(llm)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        after = ask(llm)
        model = llm.llm_engine.model_executor.driver_worker.get_model()
        held = [packed_of(module) for module in model.modules()]
        held = [weight for weight in held if weight is not None]
        assert len(held) == 10
        assert all(isinstance(weight, UnitWeight) and not weight.is_raw for weight in held)
    assert after != before
    assert after == bf16_answers(other)
