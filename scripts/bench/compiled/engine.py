"""Run all prompts on one vLLM engine and write the answers: the child process of measure_compiled_exactness.py.

python scripts/bench/compiled/engine.py MODEL SETTINGS RESULT.npz     # settings of vllm.LLM as JSON
"""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np

# Prompt lengths of each batch: one token, one prompt, several prompts, and more than run at the same time.
BATCHES = [[1], [37], [5, 14, 23], [3, 3, 3, 3], [90, 2, 64, 17, 120, 33, 8, 1, 50]]
NUM_TOKENS = 12


def prompts() -> list[list[list[int]]]:
    """Return the batches of token ids; ids fit the smallest vocabulary."""
    return [
        [[(7 * i + 13 * k + 29 * n) % 250 + 3 for i in range(n)] for k, n in enumerate(lengths)]
        for lengths in BATCHES
    ]


def answer(model: str, settings: dict[str, Any], result: str) -> None:
    """Run all batches on one engine; write tokens, log-probabilities and what Inductor did."""
    import torch
    import vllm
    from torch._dynamo.utils import counters

    llm = vllm.LLM(
        model,
        skip_tokenizer_init=True,
        max_model_len=160,
        max_num_seqs=6,
        enable_prefix_caching=False,
        max_logprobs=-1,
        num_gpu_blocks_override=128,
        seed=0,
        **settings,
    )
    sampling = vllm.SamplingParams(
        temperature=0,
        max_tokens=NUM_TOKENS,
        logprobs=-1,
        prompt_logprobs=-1,
        ignore_eos=True,
        detokenize=False,
    )
    tokens: list[list[int]] = []
    rows: list[list[float]] = []
    for batch in prompts():
        outputs = llm.generate([{"prompt_token_ids": p} for p in batch], sampling, use_tqdm=False)
        for output in outputs:
            tokens.append(list(output.outputs[0].token_ids))
            for position in [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]:
                rows.append([position[token].logprob for token in sorted(position)])
    config = llm.llm_engine.vllm_config
    options = config.compilation_config.inductor_compile_config
    facts = {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "device": device_name(),
        "quantization": config.model_config.quantization,
        "mode": str(config.compilation_config.mode),
        "backend": config.compilation_config.backend,
        "inductor_compile_config": {k: v for k, v in options.items() if isinstance(v, bool | int)},
        "inductor": {k: v for k, v in counters["inductor"].items() if "cache" in k},
    }
    values = np.array(rows, dtype=np.float64)
    np.savez(result, tokens=np.array(tokens), logprobs=values, facts=json.dumps(facts))


def device_name() -> str:
    """Return the GPU's name, or the CPU's name with the features that decide its GEMM."""
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    found = {key.strip(): value for key, _, value in (line.partition(":") for line in lines)}
    known = ("avx512f", "avx512_bf16", "amx_bf16")
    flags = [name for name in known if name in found.get("flags", "").split()]
    name = found.get("model name", platform.machine()).strip()
    return f"{name}, {os.cpu_count()} cores, {' '.join(flags)}"


if __name__ == "__main__":
    answer(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3])
