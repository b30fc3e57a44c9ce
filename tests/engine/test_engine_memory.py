"""Compressed weights take the expected bytes; no BF16 copy of them stays, and copies do not pile up while loading."""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import peaks_of_loads
import pytest
import tiny_models
import torch
from conftest import Checkpoint
from engine_pairs import ENVIRONMENT
from engines import engine, run_bounded
from live_tensors import bf16_copies
from safetensors.torch import load_file
from vllm.model_executor.models import qwen3_moe

from vllm_dfloat.device import ops
from vllm_dfloat.integration.layers.method import packed_of
from vllm_dfloat.integration.loading import report

pytestmark = pytest.mark.engine

DESC_BYTES = 32
MIB = 1 << 20


def model_of(llm: Any) -> torch.nn.Module:
    return llm.llm_engine.model_executor.driver_worker.get_model()


def fused(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a Llama checkpoint's matrices as vLLM holds them: qkv and gate_up fused."""
    matrices = {name.removesuffix(".weight"): w for name, w in weights.items() if w.dim() == 2}
    for name in [name for name in matrices if name.endswith("q_proj")]:
        parts = [matrices.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        matrices[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
    for name in [name for name in matrices if name.endswith("gate_proj")]:
        parts = [matrices.pop(name.replace("gate", part)) for part in ("gate", "up")]
        matrices[name.replace("gate_proj", "gate_up_proj")] = torch.cat(parts)
    return matrices


def test_layers_hold_the_packed_weights_of_the_checkpoint_and_nothing_else(
    bf16_checkpoint: Checkpoint,
) -> None:
    path = bf16_checkpoint("llama")
    weights = load_file(path / "model.safetensors")
    bf16_bytes = sum(weight.nbytes for weight in weights.values())
    expected = {name: ops.pack(weight) for name, weight in fused(weights).items()}
    rest = bf16_bytes - sum(2 * packed.rows * packed.cols for packed in expected.values())
    packed_bytes = sum(packed.payload.nbytes + DESC_BYTES for packed in expected.values())
    with engine(path, quantization="dfloat11") as llm:
        model = model_of(llm)
        for name, packed in expected.items():
            held = packed_of(model.get_submodule(name))
            assert held is not None, name
            assert torch.equal(held.payload, packed.payload), name
        with torch._C.DisableTorchFunctionSubclass():  # placeholders tell nobody of their storage
            parameters = sum(p.untyped_storage().nbytes() for p in model.parameters())
        assert parameters == rest + 2 * len(expected)  # one NaN in a compressed layer's weight
        summary = report.summarize(model)
    assert (summary.bf16_bytes, summary.held_bytes) == (bf16_bytes, rest + packed_bytes)
    assert summary.num_layers == summary.num_compressed == len(expected)
    assert summary.held_bytes < 0.7 * summary.bf16_bytes


def test_no_bf16_copy_of_a_compressed_weight_survives_loading(tmp_path: Path) -> None:
    # A model with its own weights: earlier engines of this process may have left theirs in memory.
    path = tiny_models.save("llama", tmp_path, seed=11)
    prints = {  # 64 bytes of each matrix; not of the first row, which is zero in an embedding
        name: weight[5, :32].view(torch.uint8).numpy().tobytes()
        for name, weight in load_file(path / "model.safetensors").items()
        if weight.dim() == 2
    }
    gc.collect()
    with engine(path, quantization="dfloat11"):
        assert bf16_copies(prints) == []
    with engine(path):
        assert "model.embed_tokens.weight" in bf16_copies(prints)  # the scan finds a real copy


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what peaks_of_loads.py measures, by architecture."""
    folder = tmp_path_factory.mktemp("peaks")
    result = folder / "result.json"
    command = [sys.executable, peaks_of_loads.__file__, result, folder]
    run_bounded([*map(str, command)], folder / "log.txt", ENVIRONMENT, 300)
    return json.loads(result.read_text())


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's peak counter is in Linux's /proc")
@pytest.mark.parametrize("name", peaks_of_loads.LARGEST_LAYER)
def test_peak_memory_while_loading_is_the_compressed_model_and_two_layers(
    name: str, peaks: dict[str, Any]
) -> None:
    peak, largest_layer = peaks[name], peaks_of_loads.LARGEST_LAYER[name]
    print(f"{peak['growth'] / MIB:.1f} MiB at the peak, {peak['held'] / MIB:.1f} held")
    has_routers = name == "qwen3_moe" and hasattr(
        qwen3_moe, "GateLinear"
    )  # other layers before 0.32
    num_routers = peaks_of_loads.LAYERS if has_routers else 0
    assert peak["left_uncompressed"] == num_routers
    assert peak["growth"] > 0.95 * peak["held"]  # the measurement sees the model at all
    assert peak["growth"] < peak["held"] + 2 * largest_layer + peak["scratch"]
    assert peak["growth"] < peak["bf16"]
