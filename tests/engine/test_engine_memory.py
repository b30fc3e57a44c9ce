"""Compressed weights take the expected bytes; no BF16 copy of them stays, and copies do not pile up while loading."""

import ctypes
import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from conftest import Checkpoint
from engines import answers, engine
from live_tensors import bf16_copies
from safetensors.torch import load_file

from vllm_dfloat.device import ops
from vllm_dfloat.device.scratch import scratch
from vllm_dfloat.integration.layers.method import packed_of
from vllm_dfloat.integration.loading import loader, report
from vllm_dfloat.integration.seam import weight_files

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


# A model whose weights are generated while they are loaded, so that no file is mapped into memory.
HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 2048, 4096, 4, 256
NUM_EXPERTS, INTERMEDIATE_OF_EXPERT = 16, 512
LARGEST_LAYER = {
    "llama": 2 * 2 * INTERMEDIATE * HIDDEN,  # gate_up_proj
    "qwen3_moe": 2 * 3 * NUM_EXPERTS * INTERMEDIATE_OF_EXPERT * HIDDEN,
}


def made_up_weights(architecture: str) -> Iterator[tuple[str, torch.Tensor]]:
    def make(name: str, *shape: int) -> tuple[str, torch.Tensor]:
        return f"{name}.weight", torch.empty(*shape, dtype=torch.bfloat16).normal_(0, 0.02)

    yield make("model.embed_tokens", VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        yield make(f"{prefix}.input_layernorm", HIDDEN)
        yield make(f"{prefix}.post_attention_layernorm", HIDDEN)
        is_mixture = architecture == "qwen3_moe"
        inner = INTERMEDIATE_OF_EXPERT if is_mixture else INTERMEDIATE
        experts = [f".experts.{i}" for i in range(NUM_EXPERTS)] if is_mixture else [""]
        for expert in experts:
            yield make(f"{prefix}.mlp{expert}.down_proj", HIDDEN, inner)
            yield make(f"{prefix}.mlp{expert}.gate_proj", inner, HIDDEN)
            yield make(f"{prefix}.mlp{expert}.up_proj", inner, HIDDEN)
        if is_mixture:
            yield make(f"{prefix}.mlp.gate", NUM_EXPERTS, HIDDEN)
            for part in "qk":
                yield make(f"{prefix}.self_attn.{part}_norm", HIDDEN // 16)
        for part in "qkvo":
            yield make(f"{prefix}.self_attn.{part}_proj", HIDDEN, HIDDEN)
    yield make("model.norm", HIDDEN)
    yield make("lm_head", VOCABULARY, HIDDEN)


def memory_now(field: str) -> int:
    """Return VmRSS (now) or VmHWM (the highest since the mark was reset) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def give_large_blocks_back_at_once() -> None:
    """Prevent the C library from keeping freed memory, which would be counted as used; free what earlier tests left."""
    m_mmap_threshold = -3
    assert ctypes.CDLL(None).mallopt(m_mmap_threshold, 256 * 1024) == 1
    scratch.release()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's peak counter is in Linux's /proc")
@pytest.mark.parametrize("name", LARGEST_LAYER)
def test_peak_memory_while_loading_is_the_compressed_model_and_two_layers(
    name: str, bf16_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = tiny_models.ARCHITECTURES[name][0]
    getattr(transformers, f"{prefix}Config")(
        architectures=[f"{prefix}ForCausalLM"], dtype="bfloat16", tie_word_embeddings=False,
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, head_dim=HIDDEN // 16,
        num_hidden_layers=LAYERS, num_attention_heads=16, num_key_value_heads=16, max_position_embeddings=256,
        num_experts=NUM_EXPERTS, num_experts_per_tok=2, moe_intermediate_size=INTERMEDIATE_OF_EXPERT,
    ).save_pretrained(tmp_path)  # fmt: skip
    answers(bf16_checkpoint(name), quantization="dfloat11")  # one-time compilation
    give_large_blocks_back_at_once()
    seen: dict[str, int] = {}
    original = loader.DFloat11ModelLoader.load_model

    def measured(self: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        seen["start"] = memory_now("VmRSS")
        model = original(self, *args, **kwargs)
        seen["peak"] = memory_now("VmHWM")
        return model

    monkeypatch.setattr(loader.DFloat11ModelLoader, "load_model", measured)
    monkeypatch.setattr(
        loader.DefaultModelLoader, "get_all_weights", lambda *_: made_up_weights(name)
    )
    monkeypatch.setattr(weight_files, "checkpoint_files", lambda *_: (tmp_path, []))
    with engine(tmp_path, quantization="dfloat11") as llm:
        summary = report.summarize(model_of(llm))
    growth = seen["peak"] - seen["start"]
    print(f"{growth / MIB:.1f} MiB at the peak, {summary.held_bytes / MIB:.1f} held")
    num_routers = LAYERS if name == "qwen3_moe" else 0
    assert summary.num_compressed == summary.num_layers - num_routers
    assert growth > 0.95 * summary.held_bytes  # the measurement sees the model at all
    assert growth < summary.held_bytes + 2 * LARGEST_LAYER[name] + summary.scratch_bytes
    assert growth < summary.bf16_bytes
