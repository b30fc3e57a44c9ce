"""With VLLM_BATCH_INVARIANT, compressed models are compiled where those in BF16 are, and only there."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability

from vllm_dfloat.integration.plugin import register

DECISION = "_uses_breakable_cudagraph_for_batch_invariance"


def config(hidden: int, intermediate: int, quantization: str | None) -> Any:
    """Return what vLLM reads of a VllmConfig of a model with 32 heads of 128 and 8 of keys."""
    model = SimpleNamespace(
        enforce_eager=False, dtype=torch.bfloat16, quantization=quantization,
        get_hidden_size=lambda: hidden, get_head_size=lambda: 128,
        get_num_attention_heads=lambda parallel: 32, get_num_kv_heads=lambda parallel: 8,
        hf_text_config=SimpleNamespace(intermediate_size=intermediate),
    )  # fmt: skip
    return SimpleNamespace(
        model_config=model, parallel_config=SimpleNamespace(tensor_parallel_size=1)
    )


def decides(*of: Any) -> bool:
    return bool(getattr(VllmConfig, DECISION)(config(*of)))


@pytest.mark.skipif(not hasattr(VllmConfig, DECISION), reason="this vLLM compiles them all")
def test_compressed_models_are_left_uncompiled_where_bf16_ones_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Bug caught: Inductor's kernels between the matrices, where BF16 vLLM has its own, and so other bits.
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    monkeypatch.setattr(
        type(current_platform), "get_device_capability", lambda self: DeviceCapability(9, 0)
    )
    register()
    register()
    shapes = (2048, 6144), (96, 160)  # the first has tiles of its own, as Qwen3 1.7B
    found = {
        (shape, method): decides(*shape, method)
        for shape in shapes
        for method in (None, "dfloat11", "fp8")
    }
    for shape in shapes:
        assert found[shape, "dfloat11"] == found[shape, None]
        assert not found[shape, "fp8"]
    assert [found[shape, None] for shape in shapes] == [True, False]
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "0")
    assert not decides(2048, 6144, "dfloat11")
