"""One engine of the serving benchmark, in a process of its own: python -m bench.serve.engine REQUEST.json RESULT.json

bench_serve.py makes the request: the engine to start and the points to measure. The result is rewritten after every
point, so that a crash loses no measured point.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.serve import half_fast
from bench.serve.points import Json, one_line, prompts, run_point, sampling

COMPARED_PROMPTS = 8
COMPARED_TOKENS = 32

Save = Callable[[Json], None]


def measure(request: Json, save: Save) -> Json:
    """Start the engine of `request`, answer the prompts that are compared, then measure every point.

    Returns:
        device, start_seconds, memory, kv_cache_tokens, answers, points; after a failure the ones so far, and error, in
        one line. Of layout "auto" choice too, the plan's sentence on it, and engine, the arguments of vLLM with the
        KV cache that was asked for.
    """
    result: Json = {"points": []}
    started = time.monotonic()
    llm = None
    try:
        from vllm import LLM

        settings = request["engine"]
        if half_fast.is_wanted(settings):
            settings, result["choice"] = half_fast.with_half_fast(request["model"], settings)
            result["engine"] = settings
            started = time.monotonic()
        llm = LLM(request["model"], **settings)
        result["start_seconds"] = round(time.monotonic() - started, 1)
        result |= describe(llm)
        result["answers"] = answer(llm, request["vocab_size"])
        save(result)
        expected = request["expected"]
        if expected is None or tokens(result["answers"]) == tokens(expected):
            for point in request["points"]:
                result["points"].append(run_point(llm, point, request, result))
                save(result)
    except Exception as error:
        result["error"] = one_line(error)
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
    save(result)
    return result


def describe(llm: Any) -> Json:
    """Return the device, the model's memory on it, and the size of the KV cache, as vLLM reports them."""
    import torch
    from vllm.model_executor.offloader import get_offloader

    from vllm_dfloat.integration.loading.report import summarize

    worker = llm.llm_engine.model_executor.driver_worker
    cache = llm.llm_engine.vllm_config.cache_config
    blocks_hold = cache.num_gpu_blocks * cache.block_size
    model = worker.get_model()
    summary, emptied = summarize(model), emptied_bytes(model)
    held = summary.held_bytes + emptied
    pool = getattr(get_offloader(), "buffer_pool", None)  # of prefetching offload
    buffers = 0 if pool is None else int(pool.total_bytes)
    on_gpu = held - summary.host_bytes + buffers
    memory = {
        "bf16_bytes": summary.bf16_bytes + emptied,
        "held_bytes": held,
        "scratch_bytes": summary.scratch_bytes,
        "host_bytes": summary.host_bytes,
        "buffer_bytes": buffers,
        "resident_bytes": on_gpu + summary.scratch_bytes,
    }
    device: Json = {"gpu": None}
    if torch.cuda.is_available():
        # vLLM measured this while loading; it includes neither offloaded bytes nor the buffers for them.
        memory["resident_bytes"] = int(worker.model_runner.model_memory_usage) + buffers
        properties = torch.cuda.get_device_properties(0)
        device = {"gpu": properties.name, "memory_bytes": properties.total_memory}
    return {
        "device": device,
        "memory": memory,
        "kv_cache_tokens": getattr(cache, "kv_cache_size_tokens", None) or blocks_hold,
        "block_size": cache.block_size,
    }


def emptied_bytes(model: Any) -> int:
    """Return the BF16 bytes of weights that vLLM's CPU build has packed for a kernel of its own.

    It keeps the packed copy where nothing lists it, and empties the parameter.
    """
    emptied = (layer for layer in model.modules() if has_emptied_weight(layer))
    return sum(
        2 * layer.output_size_per_partition * layer.input_size_per_partition for layer in emptied
    )


def has_emptied_weight(layer: Any) -> bool:
    weight = getattr(layer, "weight", None)
    return hasattr(layer, "input_size_per_partition") and weight is not None and not weight.numel()


def answer(llm: Any, vocab_size: int) -> list[Json]:
    """Return greedy tokens and their logprobs for prompts of several lengths, all in one batch."""
    asked = prompts(COMPARED_PROMPTS, [5, 17, 40, 64], vocab_size)
    given = llm.generate(
        [{"prompt_token_ids": prompt["prompt_token_ids"]} for prompt in asked],
        sampling(COMPARED_TOKENS, logprobs=0),
        use_tqdm=False,
    )
    return [
        {
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": [
                position[token].logprob
                for token, position in zip(
                    output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True
                )
            ],
        }
        for output in given
    ]


def tokens(answers: list[Json]) -> list[list[int]]:
    return [answer["tokens"] for answer in answers]


def main(request_path: str, result_path: str) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine steps in this process
    partial = Path(result_path + ".partial")

    def save(result: Json) -> None:
        partial.write_text(json.dumps(result))
        partial.replace(result_path)

    measure(json.loads(Path(request_path).read_text()), save)


if __name__ == "__main__":
    main(*sys.argv[1:])
