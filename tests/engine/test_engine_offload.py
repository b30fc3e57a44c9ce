"""--cpu-offload-gb with compressed weights: chosen layers lie in host memory, and answers are those of BF16 vLLM."""

from typing import Any

import pytest
import tiny_models
from conftest import Checkpoint
from engine_pairs import TRACED
from engines import answers, ask, bf16_answers, engine

from vllm_dfloat.device.host_arena import HostArena
from vllm_dfloat.errors import DeviceError
from vllm_dfloat.integration.layers.method import packed_of, weights_of
from vllm_dfloat.integration.loading.live_check import METHOD_NAME
from vllm_dfloat.integration.loading.report import summarize
from vllm_dfloat.integration.seam.offloader import offloader
from vllm_dfloat.integration.seam.places import is_on_host

pytestmark = pytest.mark.engine

GIB = 1 << 30
IN_BLOCKS = dict(enforce_eager=False, **TRACED, additional_config={"dfloat11": {"granularity": "block"}})  # fmt: skip
OFFICIAL_LAYOUT = dict(additional_config={"dfloat11": {"layout": "dfloat11"}})
DOWN = dict(cpu_offload_params={"down_proj", "self_attn.o_proj.weight"})
# architecture, options, whether a part of the named layers is over the budget
CASES = [
    ("gemma3", IN_BLOCKS, 0.002, True),
    ("llama", {**OFFICIAL_LAYOUT, **DOWN}, 1.0, False),
]
DENSE = [name for name in tiny_models.ARCHITECTURES if name != "qwen3_moe"]
MORE = [
    *((name, {}, 0.0015, True) for name in DENSE),
    ("qwen3_moe", {}, 0.0012, True),
    *((name, {**OFFICIAL_LAYOUT, **DOWN}, 1.0, False) for name in ("qwen3", "qwen2", "phi3")),
]


@pytest.mark.parametrize(
    ("name", "settings", "gib", "is_over"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.on_demand) for case in MORE)],
)
def test_answers_with_weights_in_host_memory_are_those_of_bf16_vllm(
    name: str, settings: dict[str, Any], gib: float, is_over: bool, bf16_checkpoint: Checkpoint
) -> None:
    model = bf16_checkpoint(name)
    how = {k: v for k, v in settings.items() if k in ("enforce_eager", "compilation_config")}
    expected = bf16_answers(model, **how)
    with engine(model, quantization="dfloat11", cpu_offload_gb=gib, **settings) as llm:
        worker = llm.llm_engine.model_executor.driver_worker
        named = [
            (layer, parameter)
            for path, layer in worker.get_model().named_modules()
            for parameter in weights_of(layer)
            if is_named(path, settings)
        ]
        chosen = [one for one in named if is_on_host(*one)]
        assert chosen
        assert (len(chosen) < len(named)) == is_over
        held, found = summarize(worker.get_model()), offloader()
        sizes = [weights_of(layer)[parameter].payload.nbytes for layer, parameter in chosen]
        assert held.host_bytes == found.arena.num_bytes == sum(sizes) <= gib * GIB
        assert held.freed_bytes >= held.host_bytes - held.scratch_bytes
        assert ask(llm) == expected


def is_named(path: str, settings: dict[str, Any]) -> bool:
    """Return whether vLLM's rule names a layer: all of the transformer blocks, or those asked for."""
    leaves = ["o_proj", "down_proj"]
    if "cpu_offload_params" not in settings:
        leaves += ["qkv_proj", "gate_up_proj", "experts"]
    return ".layers." in path and any(part in leaves for part in path.split("."))


def test_a_flipped_bit_in_host_memory_is_found_and_the_start_says_what_lies_there(
    bf16_checkpoint: Checkpoint, log_lines: list[str]
) -> None:
    with engine(bf16_checkpoint("qwen3"), quantization="dfloat11", cpu_offload_gb=1) as llm:
        (line,) = [line for line in log_lines if "in host memory" in line]
        held = offloader().arena.num_bytes
        assert (
            f"0.003 GiB of weights in host memory ({held} bytes; --cpu-offload-gb 1 counts" in line
        )
        assert line.endswith(
            "model.layers.0-1 (self_attn.qkv_proj, self_attn.o_proj, mlp.gate_up_proj, mlp.down_proj)"
        )
        model = llm.llm_engine.model_executor.driver_worker.get_model()
        layer = model.get_submodule("model.layers.1.mlp.down_proj")
        assert is_on_host(layer)
        packed_of(layer).payload[100] ^= 1
        (report,) = llm.collective_rpc(METHOD_NAME)
        assert [sentence.partition(":")[0] for sentence in report["damaged"]] == [
            "model.layers.1.mlp.down_proj"
        ]


def test_too_little_host_memory_is_one_sentence_before_weights_are_read(
    bf16_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostArena.__init__, "__defaults__", (lambda: 1 << 20,))
    with pytest.raises(
        DeviceError, match=r"--cpu-offload-gb 1: \d+ bytes .* 1048576 are available"
    ):
        answers(bf16_checkpoint("qwen3"), quantization="dfloat11", cpu_offload_gb=1)


def test_names_that_match_nothing_are_a_warning(
    bf16_checkpoint: Checkpoint, log_lines: list[str]
) -> None:
    model, names = bf16_checkpoint("qwen3"), {"down", "experts"}
    settings = dict(cpu_offload_gb=1, cpu_offload_params=names)
    assert answers(model, quantization="dfloat11", **settings) == bf16_answers(model)
    (line,) = [line for line in log_lines if "--cpu-offload-gb" in line]
    assert (
        "no compressed weight of this model with --cpu-offload-params down experts; all are on"
        in line
    )
