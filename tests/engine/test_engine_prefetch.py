"""--offload-group-size with compressed weights: layers that are copied ahead of use give the answers of BF16 vLLM.

BF16 vLLM stops on a CPU with these options, so it runs without them.
"""

from typing import Any

import pytest
import tiny_models
from conftest import Checkpoint
from engine_pairs import TRACED
from engines import ask, bf16_answers, engine
from safetensors.torch import load_file

from vllm_dfloat.device.host_arena import HostArena
from vllm_dfloat.errors import DeviceError, FormatError
from vllm_dfloat.integration.layers.method import packed_of, weights_of
from vllm_dfloat.integration.loading.live_check import METHOD_NAME
from vllm_dfloat.integration.loading.report import summarize
from vllm_dfloat.integration.seam.offloader import offloader
from vllm_dfloat.integration.seam.places import is_on_host

pytestmark = pytest.mark.engine


def options(**given: Any) -> dict[str, Any]:
    return dict(additional_config={"dfloat11": given})


ALL = dict(offload_group_size=1)
TWO_SLOTS = dict(offload_group_size=1, offload_prefetch_step=2)
DOWN = dict(offload_params={"down_proj", "self_attn.o_proj.weight"})
IN_BLOCKS = dict(enforce_eager=False, **TRACED, **options(granularity="block"))
COMPILED = dict(enforce_eager=False)
EXPERTS = dict(offload_params={"experts"})
# architecture, options
CASES = [("qwen2", {**TWO_SLOTS, **options(layout="fast")})]
MORE = [
    ("gemma3", {**ALL, **IN_BLOCKS}),
    *((name, ALL) for name in tiny_models.ARCHITECTURES),
    ("llama", {**ALL, **COMPILED}),
    ("llama", dict(offload_group_size=2)),
    ("qwen3_moe", {**TWO_SLOTS, **EXPERTS}),
    ("qwen3_moe", {**ALL, **EXPERTS, **options(layout="fast"), "enforce_eager": False, **TRACED}),
    ("phi3", {**ALL, **DOWN, **options(layout="dfloat11")}),
    ("qwen3", {**ALL, **options(layout="auto", kv_tokens=64)}),
    ("llama", {**ALL, **options(mode="fused-exact", layout="fast")}),
]


@pytest.mark.parametrize(
    ("name", "settings"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.on_demand) for case in MORE)],
)
def test_answers_with_layers_copied_ahead_of_use_are_those_of_bf16_vllm(
    name: str, settings: dict[str, Any], bf16_checkpoint: Checkpoint
) -> None:
    model = bf16_checkpoint(name)
    how = {k: v for k, v in settings.items() if k in ("enforce_eager", "compilation_config")}
    expected = bf16_answers(model, **how)
    with engine(model, quantization="dfloat11", **settings) as llm:
        model = llm.llm_engine.model_executor.driver_worker.get_model()
        on_host = [
            weights_of(layer)[parameter]
            for layer in model.modules()
            for parameter in weights_of(layer)
            if is_on_host(layer, parameter)
        ]
        assert on_host
        assert all(packed.staged is not None for packed in on_host)
        held = summarize(model)
        assert held.host_bytes == sum(packed.payload.nbytes for packed in on_host)
        assert held.buffer_bytes == offloader().buffer_pool.total_bytes > 0
        assert ask(llm) == expected
        assert ask(llm) == expected  # the ring has turned
        (report,) = llm.collective_rpc(METHOD_NAME)
        assert report["damaged"] == []


def test_the_start_says_what_is_copied_and_new_weights_and_wrong_ones_are_noticed(
    bf16_checkpoint: Checkpoint,
    log_lines: list[str],
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = bf16_checkpoint("qwen3")
    second = tiny_models.save("qwen3", tmp_path / "second", seed=7)
    expected = {path: bf16_answers(path) for path in (first, second)}
    with engine(first, quantization="dfloat11", **ALL) as llm:
        (line,) = [line for line in log_lines if "in host memory" in line]
        size = offloader().buffer_pool.total_bytes
        assert (
            "--offload-group-size 1 --offload-num-in-group 1 --offload-prefetch-step 1; copied ahead of use into "
            f"{size} bytes of the device): model.layers.0-1 (self_attn.qkv_proj, self_attn.o_proj, mlp.gate_up_proj, "
            "mlp.down_proj)"
        ) in line
        model = llm.llm_engine.model_executor.driver_worker.get_model()
        assert ask(llm) == expected[first]
        model.load_weights(load_file(second / "model.safetensors").items())
        assert ask(llm) == expected[second]
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(first)})
        assert ask(llm) == expected[first]
        payload = packed_of(model.get_submodule("model.layers.1.mlp.down_proj")).payload
        payload[100] ^= 1
        (report,) = llm.collective_rpc(METHOD_NAME)
        assert [sentence.partition(":")[0] for sentence in report["damaged"]] == [
            "model.layers.1.mlp.down_proj"
        ]
        payload[100] ^= 1
        monkeypatch.setattr(offloader(), "_start_prefetch", lambda layer_idx: None)
        monkeypatch.setattr(offloader(), "is_in_its_slot", lambda module: True)
        with pytest.raises(FormatError, match=r"model\.layers\.1\..*another layer's payload lies"):
            ask(llm)


def test_too_little_host_memory_is_one_sentence_before_weights_are_read(
    bf16_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostArena.__init__, "__defaults__", (lambda: 1 << 20,))
    with (
        pytest.raises(DeviceError, match=r"--offload-group-size 1 .* 1048576 are available"),
        engine(bf16_checkpoint("qwen3"), quantization="dfloat11", **ALL),
    ):
        pass
