"""A plan for ranks that share experts has the bytes that vLLM's loader then holds on such a rank."""

import dataclasses
from pathlib import Path

import architectures
import plan_engines
import pytest
from model_loads import loaded

from vllm_dfloat.device.scratch import scratch
from vllm_dfloat.integration.loading.report import summarize
from vllm_dfloat.plan.plan import make_plan
from vllm_dfloat.plan.settings import Settings

pytestmark = pytest.mark.engine

ON_DEMAND = ("Mixtral", "Qwen2Moe", "DeepseekV2")
WAYS = {  # what vLLM tells a layer of experts about its rank, by the options of `plan`
    "whole experts": (
        Settings(dp=3, expert_parallel=True),  # the first rank has two of four experts
        dict(ep_size=3, ep_rank=0, use_ep=True),
    ),
    "parts": (Settings(dp=4), dict(tp_size=4, tp_rank=3)),
}
ROOM = 1.02  # codes are measured on a sample


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "name", ["Qwen3Moe", *(pytest.param(name, marks=pytest.mark.on_demand) for name in ON_DEMAND)]
)
def test_plan_has_the_bytes_of_a_rank_of_data_parallel_engines(
    name: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig

    settings, faked = WAYS[way]
    make = FusedMoEParallelConfig.make
    monkeypatch.setattr(
        FusedMoEParallelConfig, "make", lambda *a, **k: dataclasses.replace(make(*a, **k), **faked)
    )
    cls = f"{name}ForCausalLM"
    entries = {**architectures.SHAPE, **architectures.CASES[cls], "first_k_dense_replace": 0}
    model = architectures.save(cls, tmp_path, entries)
    (rank,) = make_plan(str(model), dataclasses.replace(settings, slots=1)).ranks
    scratch.release()  # earlier models of this process may have needed more
    with loaded(model, quantization="dfloat11") as served:
        found, unseen = summarize(served), plan_engines.unseen_bytes(served)
    assert rank.bf16_weights == found.bf16_bytes + unseen
    assert rank.scratch == found.scratch_bytes
    held = found.held_bytes + unseen
    assert held / ROOM < rank.dfloat11_weights < held * ROOM
