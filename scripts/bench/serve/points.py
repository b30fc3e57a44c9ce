"""The points that the serving benchmark measures on an engine: decode steps, a prefill, the largest batch that fits."""

import gc
import math
import random
import time
from typing import Any

WARM_UP = 8  # decode steps before the timed ones
MIN_STEPS = 5  # timed steps per point, even if they are slow
MAX_PREFILLS = 20

Json = dict[str, Any]


class NotRun(Exception):
    """A point was not measured; the message is the reason."""


def one_line(error: BaseException) -> str:
    """Return the message of an exception in one line, for a table."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:300]}"


def prompts(count: int, lengths: list[int], vocab_size: int) -> list[Json]:
    """Return `count` random prompts with these lengths in turn, the same in every engine."""
    source = random.Random(0)
    return [
        {
            "type": "token",
            "prompt_token_ids": [
                source.randrange(vocab_size) for _ in range(lengths[k % len(lengths)])
            ],
        }
        for k in range(count)
    ]


def sampling(max_tokens: int, **more: Any) -> Any:
    """Return greedy sampling that never stops early."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        **{"output_kind": RequestOutputKind.DELTA, **more},
    )


def run_point(llm: Any, point: Json, request: Json, result: Json) -> Json:
    """Return the point with its times, or with the reason for having none."""
    left = request["deadline"] - time.time()
    if left <= 0:
        return {**point, "not_run": f"the budget of {request['budget']:g} s was spent"}
    seconds = min(request["point_seconds"], left)
    try:
        if point["kind"] == "prefill":
            return {**point, **time_prefill(llm, point["tokens"], request["vocab_size"], seconds)}
        batch = point.get("batch") or largest_batch(request, result)
        generated = allowance(batch, point["context"], request)
        context = point["context"]
        if point["kind"] == "capacity":
            context -= generated
        fits = result["kv_cache_tokens"] // blocks(context + generated, result["block_size"])
        if batch > fits:
            raise NotRun(f"the KV cache holds {fits} such sequences")
        asked = prompts(batch, [context], request["vocab_size"])
        return {**point, "batch": batch, **time_decode(llm, asked, generated, request, seconds)}
    except NotRun as reason:
        return {**point, "not_run": str(reason)}
    except Exception as error:  # out of memory, for example; the next point may need less
        return {**point, "not_run": one_line(error)}


def blocks(length: int, block_size: int) -> int:
    """Return the tokens of KV cache that a sequence of `length` tokens takes, rounded up to vLLM's blocks."""
    return math.ceil(length / block_size) * block_size


def largest_batch(request: Json, result: Json) -> int:
    """Return how many sequences of request["hold"] tokens the KV cache holds, without vLLM's null block.

    At most max_num_seqs.
    """
    free = result["kv_cache_tokens"] - result["block_size"]
    fits = free // blocks(request["hold"], result["block_size"])
    if not fits:
        raise NotRun(f"the KV cache holds no sequence of {request['hold']} tokens")
    return int(min(fits, request["engine"]["max_num_seqs"]))


def allowance(batch: int, context: int, request: Json) -> int:
    """Return the most tokens that a sequence generates: during the other prefills, the warm-up and the timed steps."""
    per_step = max(1, request["engine"]["max_num_batched_tokens"] - batch)
    prefills = math.ceil(batch * context / per_step) + 2
    generated = int(prefills + WARM_UP + request["steps"] + 2)
    if generated > request["engine"]["max_model_len"] - 1:
        raise NotRun(f"prefill of {batch} sequences takes {prefills} steps; --hold is too small")
    return generated


def start_batch(llm: Any, asked: list[Json], generated: int) -> list[str]:
    """Add the requests, step until each has its first token, and return their ids."""
    engine = llm.llm_engine
    ids = [
        engine.add_request(f"{time.monotonic_ns()}-{k}", prompt, sampling(generated))
        for k, prompt in enumerate(asked)
    ]
    seen: set[str] = set()
    while len(seen) < len(asked):
        if not engine.has_unfinished_requests():
            raise NotRun("sequences ended before all of them had started")
        seen |= {output.request_id for output in engine.step()}
    return ids


def time_decode(llm: Any, asked: list[Json], generated: int, request: Json, seconds: float) -> Json:
    """Return {"ms": [...]}, the time of each step in which every sequence of the batch got one token."""
    engine = llm.llm_engine
    ids: list[str] = []
    times: list[float] = []
    gc.collect()
    try:
        ids = start_batch(llm, asked, generated)
        for _ in range(WARM_UP):
            engine.step()
        begin = time.perf_counter()
        while len(times) < request["steps"]:
            start = time.perf_counter()
            if len(engine.step()) != len(asked):
                raise NotRun("vLLM preempted sequences: the KV cache was full")
            times.append(time.perf_counter() - start)
            if len(times) >= MIN_STEPS and time.perf_counter() - begin > seconds:
                break
    finally:
        engine.abort_request(ids)
        drain(engine)
    return {"ms": [round(1000 * value, 4) for value in times]}


def drain(engine: Any) -> None:
    """Step until nothing is in flight, so that the next point starts with an idle engine."""
    while engine.has_unfinished_requests():
        engine.step()


def time_prefill(llm: Any, length: int, vocab_size: int, seconds: float) -> Json:
    """Return {"ms": [...]}, the times from adding one prompt to its first token, without the first time."""
    (asked,) = prompts(1, [length], vocab_size)
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) <= MAX_PREFILLS:
        start = time.perf_counter()
        start_batch(llm, [asked], 1)
        times.append(time.perf_counter() - start)
        drain(llm.llm_engine)
        if len(times) > MIN_STEPS and time.perf_counter() - begin > seconds:
            break
    return {"ms": [round(1000 * value, 4) for value in times[1:]]}
