"""Measure the highest memory use while vLLM loads compressed models whose weights are generated as they are loaded.

A script: python peaks_of_loads.py RESULT.json FOLDER. In a process of its own, because memory that earlier tests freed
lies scattered and is counted again when small objects take it.
"""

import ctypes
import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import tiny_models
import torch
import transformers
from engines import answers, engine

from vllm_dfloat.device.scratch import scratch
from vllm_dfloat.integration.loading import loader, report
from vllm_dfloat.integration.seam import weight_files

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


def save_config(architecture: str, folder: Path) -> Path:
    """Write a config.json without weights."""
    prefix = tiny_models.ARCHITECTURES[architecture][0]
    getattr(transformers, f"{prefix}Config")(
        architectures=[f"{prefix}ForCausalLM"], dtype="bfloat16", tie_word_embeddings=False,
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, head_dim=HIDDEN // 16,
        num_hidden_layers=LAYERS, num_attention_heads=16, num_key_value_heads=16, max_position_embeddings=256,
        num_experts=NUM_EXPERTS, num_experts_per_tok=2, moe_intermediate_size=INTERMEDIATE_OF_EXPERT,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def memory_now(field: str) -> int:
    """Return VmRSS (now) or VmHWM (the highest since the mark was reset) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def give_large_blocks_back_at_once() -> None:
    """Prevent the C library from keeping freed memory, which would be counted as used."""
    m_mmap_threshold = -3
    assert ctypes.CDLL(None).mallopt(m_mmap_threshold, 256 * 1024) == 1
    scratch.release()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def measured(architecture: str, folder: Path) -> dict[str, Any]:
    """Return by how many bytes memory grew at most while a model was loaded, and what the model then held."""
    answers(tiny_models.save(architecture, folder / "tiny"), quantization="dfloat11")  # compiles
    config = save_config(architecture, folder / "large")
    give_large_blocks_back_at_once()
    seen: dict[str, int] = {}
    original = loader.DFloat11ModelLoader.load_model

    def load(self: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        seen["start"] = memory_now("VmRSS")
        model = original(self, *args, **kwargs)
        seen["peak"] = memory_now("VmHWM")
        return model

    weights = made_up_weights(architecture)
    with (
        mock.patch.object(loader.DFloat11ModelLoader, "load_model", load),
        mock.patch.object(loader.DefaultModelLoader, "get_all_weights", return_value=weights),
        mock.patch.object(weight_files, "checkpoint_files", return_value=(config, [])),
        engine(config, quantization="dfloat11") as llm,
    ):
        model = llm.llm_engine.model_executor.driver_worker.get_model()
        summary = report.summarize(model)
    return {
        "growth": seen["peak"] - seen["start"],
        "held": summary.held_bytes,
        "bf16": summary.bf16_bytes,
        "scratch": summary.scratch_bytes,
        "left_uncompressed": summary.num_layers - summary.num_compressed,
    }


def main(result: str, folder: str) -> None:
    found = {name: measured(name, Path(folder) / name) for name in LARGEST_LAYER}
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
