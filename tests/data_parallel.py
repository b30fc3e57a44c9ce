"""A script: two data-parallel engines answer, are given new weights, and refuse damaged ones.

python data_parallel.py FIRST SECOND DAMAGED RESULT.json: three checkpoints, and the file for the result.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from engines import PROMPTS, SETTINGS, values
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

SIZE = 2


async def ask(llm: Any, engine: int) -> Any:
    """Return tokens and all logprobs of each prompt, one after the other, from one of the engines."""
    found = []
    for i, prompt in enumerate(PROMPTS):
        how = SamplingParams(
            temperature=0, max_tokens=8, logprobs=-1, ignore_eos=True, detokenize=False
        )
        given = {"prompt_token_ids": prompt}
        last = None
        async for output in llm.generate(given, how, f"{engine}-{i}", data_parallel_rank=engine):
            last = output
        assert last is not None
        answer = last.outputs[0]
        found.append([list(answer.token_ids), [values(at) for at in answer.logprobs]])
    return found


async def run(first: str, second: str, damaged: str, **quantization: str) -> dict[str, Any]:
    settings = {**SETTINGS, "enforce_eager": True, "data_parallel_size": SIZE, **quantization}
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model=first, **settings))

    async def reload(path: str) -> None:
        await llm.collective_rpc("reload_weights", kwargs={"weights_path": path})

    found: dict[str, Any] = {"before": [await ask(llm, engine) for engine in range(SIZE)]}
    await reload(second)
    found["after"] = [await ask(llm, engine) for engine in range(SIZE)]
    if quantization:
        try:
            await reload(damaged)
        except Exception as error:
            found["refused"] = str(error)
        found["still"] = [await ask(llm, engine) for engine in range(SIZE)]
        found["checks"] = await llm.collective_rpc("check_dfloat11_weights")
    llm.shutdown()
    return found


def main(first: str, second: str, damaged: str, result: str) -> None:
    both = {
        "dfloat11": asyncio.run(run(first, second, damaged, quantization="dfloat11")),
        "bf16": asyncio.run(run(first, second, damaged)),
    }
    Path(result).write_text(json.dumps(both))


if __name__ == "__main__":
    main(*sys.argv[1:])
