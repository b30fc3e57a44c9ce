"""Start real vLLM engines and return their memory figures, for comparison with a plan.

Also a script, for ranks in separate processes: python plan_engines.py RUNS.json ANSWERS.json
"""

import json
import sys
from pathlib import Path
from typing import Any

from engines import engine

REPORTED = ("bf16_bytes", "held_bytes", "scratch_bytes")
BATCHED_TOKENS = 128


def of_rank(model: Any) -> dict[str, int]:
    """Return the memory figures of a rank's model; runs in the rank's process."""
    from vllm_dfloat.integration.loading.report import summarize

    summary, unseen = summarize(model), unseen_bytes(model)
    found = {name: getattr(summary, name) for name in REPORTED}
    return found | {name: found[name] + unseen for name in ("bf16_bytes", "held_bytes")}


def unseen_bytes(model: Any) -> int:
    """Return the bytes, negative, that parameters show too much: on some CPUs (AMX) vLLM converts biases to float32."""
    from vllm.model_executor.layers.linear import LinearBase

    unseen = 0
    for layer in model.modules():
        if not isinstance(layer, LinearBase):
            continue
        if layer.bias is not None:  # of compressed layers too: they call the same GEMM
            unseen -= layer.bias.nbytes - 2 * layer.bias.numel()
    return unseen


def reported(model: Path, room: int, **settings: Any) -> dict[str, Any]:
    """Return the memory figures of each rank of an engine, and the numbers of KV-cache tokens.

    Args:
        room: bytes per rank for weights, scratch and KV cache together.

    Returns:
        ranks: `REPORTED` of each; kv_tokens: as vLLM reported at its start; tokens_of_room: computed by vLLM's own
        functions from the room that the weights leave; state_dtype: of the states of layers that have one.
    """
    from vllm.v1.core import kv_cache_utils

    from vllm_dfloat.device.scratch import scratch

    scratch.release()  # an earlier engine in this process may have needed more
    given = dict(num_gpu_blocks_override=None, max_num_batched_tokens=BATCHED_TOKENS)
    with engine(model, **{**given, **settings}) as llm:
        config = llm.llm_engine.vllm_config
        ranks = llm.apply_model(of_rank)
        specs = llm.collective_rpc("get_kv_cache_spec")
        left = [room - rank["held_bytes"] - rank["scratch_bytes"] for rank in ranks]
        caches = kv_cache_utils.get_kv_cache_configs(config, specs, left)
        scheduled = kv_cache_utils.generate_scheduler_kv_cache_config(caches)
        tokens, _ = kv_cache_utils.get_kv_cache_capacity(config, scheduled)
        return {
            "ranks": ranks,
            "kv_tokens": config.cache_config.kv_cache_size_tokens,
            "tokens_of_room": tokens,
            "state_dtype": str(config.cache_config.mamba_ssm_cache_dtype),
        }


def main(runs: str, result: str) -> None:
    answers = [
        reported(Path(run.pop("model")), **run) for run in json.loads(Path(runs).read_text())
    ]
    Path(result).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
