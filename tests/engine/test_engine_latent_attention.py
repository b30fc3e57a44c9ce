"""Latent attention (MLA, DeepSeek): it reads the same kv_b_proj as in BF16 vLLM, with the same strides, held once."""

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from engines import ask, engine

from vllm_dfloat.integration.layers.method import packed_of
from vllm_dfloat.integration.loading import report

pytestmark = pytest.mark.engine


def look(path: Path, **options: Any) -> tuple[Any, dict[str, Any], report.Summary, list[str]]:
    """Return the answers, what the attention holds, the sizes, and the names of compressed layers."""
    with engine(path, **options) as llm:
        answer = ask(llm)
        model = llm.llm_engine.model_executor.driver_worker.get_model()
        held = {
            f"{path}.{name}": (tuple(tensor.shape), tensor.stride(), tensor.detach().clone())
            for path, module in model.named_modules()
            for name, tensor in {**vars(module), **module._parameters}.items()
            if name.startswith(("W_U", "_packed")) and isinstance(tensor, torch.Tensor)
        }
        kv_b = model.get_submodule("model.layers.0.self_attn.kv_b_proj").weight
        held["kv_b_proj"] = (tuple(kv_b.shape), kv_b.stride(), kv_b.detach().clone())
        compressed = [n for n, m in model.named_modules() if packed_of(m) is not None]
        return answer, held, report.summarize(model), compressed


def test_latent_attention_reads_the_weights_of_bf16_vllm(tmp_path: Path) -> None:
    # Bug caught: views of a decoded kv_b_proj had other strides, bmm took another kernel, and logprobs differed by
    # 0.0039 on a CPU without AMX; the decoded copies were held next to the compressed weight and counted as savings.
    model = tiny_models.save("deepseek_v2", tmp_path)
    expected, plain, of_bf16, _ = look(model)
    answer, held, sizes, compressed = look(model, quantization="dfloat11")
    assert answer == expected
    assert held.keys() == plain.keys()

    for name, (shape, strides, tensor) in plain.items():
        assert held[name][:2] == (shape, strides), name
        assert torch.equal(held[name][2], tensor), name
    assert "model.layers.0.self_attn.o_proj" in compressed
    assert not any("kv_b_proj" in name for name in compressed)
    parameters = sum(w.numel() for w in load(model).values())
    assert sizes.bf16_bytes <= 2 * parameters  # views are counted once
    assert sizes.held_bytes < sizes.bf16_bytes - 0.25 * 2 * sizes.weights
    assert of_bf16.num_compressed == 0


def load(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")
