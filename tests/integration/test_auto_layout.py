"""Layout "auto" where the plan cannot be made: everything is packed, and the line says why and what else to do."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Checkpoint

from vllm_dfloat.integration.loading.auto_layout import choose
from vllm_dfloat.integration.seam.options import Options


def settings(model: Path, **cache: Any) -> Any:
    """Return what `choose` reads of a VllmConfig."""
    memory = dict(gpu_memory_utilization=0.9, kv_cache_memory_bytes=None, enable_prefix_caching=False)  # fmt: skip
    return SimpleNamespace(
        cache_config=SimpleNamespace(
            **{**memory, "cache_dtype": "auto", "mamba_ssm_cache_dtype": "auto", **cache}
        ),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=1, pipeline_parallel_size=1, enable_expert_parallel=False
        ),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=2048, max_num_seqs=4),
        model_config=SimpleNamespace(model=str(model), max_model_len=128),
    )


def test_with_a_plan_some_layers_are_fast(bf16_checkpoint: Checkpoint) -> None:
    layers, _ = choose(settings(bf16_checkpoint("llama")), Options())
    assert layers


def test_a_wish_for_tokens_without_room_is_a_warning(
    bf16_checkpoint: Checkpoint, log_lines: list[str]
) -> None:
    wish = Options(layout="auto", kv_tokens=10**12)
    assert choose(settings(bf16_checkpoint("llama")), wish)[0] == frozenset()
    (line,) = log_lines
    assert line.startswith(
        "dfloat11: kv_tokens 1,000,000,000,000: even with all matrices packed there is room"
    )


@pytest.mark.parametrize("case", ["another dtype of the KV cache", "a name too long for a file"])
def test_without_a_plan_all_are_packed_and_the_line_has_advice_for_an_engine(
    case: str, bf16_checkpoint: Checkpoint
) -> None:
    # Bugs caught: the only advice was to give another dtype; a traceback of the name that is too long.
    if case.startswith("another"):
        layers, line = choose(settings(bf16_checkpoint("llama"), cache_dtype="nvfp4"), Options())
    else:
        layers, line = choose(settings(Path("x" * 5000)), Options())
    assert not layers
    assert line.startswith("auto: all layers are packed, since the plan is not known: ")
    assert line.endswith('Or choose the layout yourself, "fast" or "packed".')
