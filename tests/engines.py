"""Run real vLLM engines and return all their answers, for comparison to the last bit.

Also a script, for engines that need a separate process: python engines.py RUNS.json ANSWERS.json
"""

import atexit
import functools
import gc
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import changed_classes

# Prompts of different lengths, so that prefill and decode run in batches.
PROMPTS = [[(7 * i + 13 * k) % 250 + 3 for i in range(5 + 9 * k)] for k in range(3)]
SETTINGS: dict[str, Any] = dict(
    skip_tokenizer_init=True,
    max_model_len=128,
    max_num_seqs=4,
    enable_prefix_caching=False,
    max_logprobs=-1,
    num_gpu_blocks_override=64,  # a KV cache that takes no time to clear
    seed=0,
)

Answers = list[dict[str, Any]]

atexit.register(gc.unfreeze)  # else objects that `engine` froze are reported as leaked at exit


@contextmanager
def engine(model: Path, **settings: Any) -> Iterator[Any]:
    """Yield an LLM on the folder `model` (eager unless settings say otherwise), and shut it down afterwards."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT

    prepare_vllm()
    gc.freeze()
    with _garbage_of_engines_alone():
        try:
            llm = LLM(str(model), **{"enforce_eager": True, **SETTINGS, **settings})
        except BaseException:
            cleanup_dist_env_and_memory()  # else the next engine finds this one's process group
            _ROPE_DICT.clear()  # and its rotary tables, which depend on its mode
            changed_classes.restore()
            raise
    try:
        _make_buffers_between_stages(llm)
        yield llm
    finally:
        with _garbage_of_engines_alone():
            llm.llm_engine.engine_core.shutdown()
            del llm
        changed_classes.restore()


@contextmanager
def _garbage_of_engines_alone() -> Iterator[None]:
    """Prevent vLLM from freezing the engine's objects at its start, and from unfreezing all objects at its end.

    vLLM collects garbage eight times per engine. If the objects of all modules, which are frozen before the start, were
    collected too, this would take three quarters of an engine's time here.
    """
    with mock.patch.object(gc, "freeze"), mock.patch.object(gc, "unfreeze"):
        yield


def _make_buffers_between_stages(llm: Any) -> None:
    """Run a dummy batch that vLLM's CPU worker omits in eager mode: without it, pipeline stages cannot receive.

    A stage allocates its receive buffer in its first dummy run (_dummy_run of gpu_model_runner.py). Other workers make
    one to measure memory. CPUWorker skips it in eager mode, so the first prompt ends in an AssertionError in
    sync_and_gather_intermediate_tensors, in BF16 too. The dummy batch of data parallelism is such a run; it writes
    nothing into the KV cache.
    """
    config = llm.llm_engine.vllm_config
    if config.parallel_config.pipeline_parallel_size > 1 and config.model_config.enforce_eager:
        llm.collective_rpc("execute_dummy_batch")


@functools.cache
def prepare_vllm() -> None:
    """Once in a process, prevent vLLM from starting another one to inspect each new architecture, which takes 10 s.

    And from looking through all modules at the start of each engine for the Triton kernels that it replaces on CPUs
    (since 0.32), which takes half of a small engine's time: the first engine has replaced them all.
    """
    from vllm.model_executor.models import registry

    changed_classes.note()
    info = registry._ModelInfo.from_model_cls
    registry._LazyRegisteredModel.inspect_model_cls = lambda model: info(model.load_model_cls())
    with suppress(ImportError):
        from vllm.triton_utils import dispatcher

        register = dispatcher.register_kernels
        dispatcher.register_kernels = lambda kernels: (
            None if kernels.keys() <= dispatcher._registry.keys() else register(kernels)
        )


def ask(llm: Any, prompts: list[list[int]] = PROMPTS, num_tokens: int = 12) -> Answers:
    """Return greedy tokens and all logprobs, of the whole vocabulary at every position."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0,
        max_tokens=num_tokens,
        logprobs=-1,
        prompt_logprobs=-1,
        ignore_eos=True,
        detokenize=False,
    )
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    return [
        {
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": [values(position) for position in output.outputs[0].logprobs],
            "prompt_logprobs": [values(position) for position in output.prompt_logprobs[1:]],
        }
        for output in outputs
    ]


def values(position: dict[int, Any]) -> list[tuple[int, float]]:
    return [(token, position[token].logprob) for token in sorted(position)]


def answers(model: Path, **settings: Any) -> Answers:
    """Return the answers of a new engine on `model`."""
    with engine(model, **settings) as llm:
        return ask(llm)


_of_bf16: dict[str, Answers] = {}


def bf16_answers(model: Path, **settings: Any) -> Answers:
    """Return the answers of BF16 vLLM, computed once per content of the folder, settings and environment of vLLM."""
    content = hashlib.sha256()
    for file in sorted(Path(model).glob("*")):
        content.update(file.name.encode() + file.read_bytes())
    environment = {k: v for k, v in os.environ.items() if k.startswith("VLLM_")}
    key = json.dumps([content.hexdigest(), settings, environment], sort_keys=True)
    if key not in _of_bf16:
        with engine(model, **settings) as llm:
            assert llm.llm_engine.vllm_config.model_config.quantization is None
            _of_bf16[key] = ask(llm)
    return _of_bf16[key]


def answers_elsewhere(
    runs: list[dict[str, Any]],
    folder: Path,
    environment: dict[str, str],
    timeout: float,
    script: str = __file__,
) -> list[Answers]:
    """Return the answers of several engines, run one after the other in a separate process.

    The process and all its workers are ended afterwards, also after an error.
    """
    (folder / "runs.json").write_text(json.dumps(runs))
    command = [sys.executable, script, str(folder / "runs.json"), str(folder / "answers.json")]
    run_bounded(command, folder / "log.txt", environment, timeout)
    return json.loads((folder / "answers.json").read_text())


def run_bounded(command: list[str], log: Path, environment: dict[str, str], timeout: float) -> None:
    """Run a command in its own session, end the session, and raise with its log if it failed."""
    with start(command, log, environment) as process:
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end after {timeout} s: {_tail(log)}") from None
    if status:
        raise AssertionError(f"exit {status}: {_tail(log)}")


@contextmanager
def start(
    command: list[str], log: Path, environment: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command in its own session; afterwards end the whole session."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        try:
            yield process
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(process.pid, number)
                    process.wait(10)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    continue


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-4000:]


def normal(given: Answers) -> Answers:
    """Return answers after conversion to JSON and back."""
    return json.loads(json.dumps(given))


@contextmanager
def forked_ranks() -> Iterator[None]:
    """Let vLLM fork the ranks of engines from this process, as it does on GPUs, instead of starting each anew.

    On CPUs it starts them anew, and each imports vLLM, which takes most of the time of a small engine.
    """
    from vllm.v1.executor import multiproc_executor

    fork = multiprocessing.get_context("fork")
    with mock.patch.object(multiproc_executor, "get_mp_context", return_value=fork):
        yield


def as_script(runs: str, result: str) -> None:
    """Answer by each of the runs: a model, engine settings, and perhaps `forks`."""
    collected: list[Answers] = []
    for run in json.loads(Path(runs).read_text()):
        with forked_ranks() if run.pop("forks", False) else nullcontext():
            collected.append(answers(Path(run.pop("model")), **run))
    Path(result).write_text(json.dumps(collected))


if __name__ == "__main__":
    as_script(*sys.argv[1:])
