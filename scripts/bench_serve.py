"""Measure real vLLM end to end with BF16 weights and with DFloat11, after comparing their tokens.

    python scripts/bench_serve.py                                  # random weights in the shape of Llama 3.1 8B
    python scripts/bench_serve.py --model PATH --variants bf16,exact,fused,offload,official
    python scripts/bench_serve.py --variants bf16,exact,offload,exact_offload,offload_more     # weights in host memory
    python scripts/bench_serve.py --variants bf16,exact,prefetch,exact_prefetch --engine '{"offload_num_in_group": 2}'
    python scripts/bench_serve.py --shape tiny --eager --output FILE.json      # a rehearsal, also on a CPU

Variants, among others (--help): BF16; DFloat11 exact; DFloat11 fused; BF16 with as many bytes of weights in pinned host
memory as DFloat11 saves (offload); DFloat11 exact with as many there (exact_offload), and BF16 in the same GPU memory
as that (offload_more); both with one layer of four there, copied ahead of use (prefetch, exact_prefetch). Each engine
is its own process, in which VLLM_BATCH_INVARIANT and the like count; whole runs are repeated in alternating order. The
result is a table, a JSON file and a PNG, under scripts/results/<gpu>/ or at --output. Exit status: 0 measured; 1 the
tokens of an exact variant differ from those of BF16, or exact or BF16 did not run; 2 bad input.
"""

import datetime
import os
import shlex
import signal
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from bench.serve import fork as bench_serve_fork
from bench.serve import launch as bench_serve_launch
from bench.serve import report
from bench.serve.engine import tokens
from bench.serve.model import BenchError
from bench.serve.options import AS_LARGE_AS, COMPARED, EXACT, VARIANTS, Options, parse

GIB = 1 << 30
FIRST_BATCHES = 64  # of --decode-first
BATCHED_TOKENS = 8192  # at least; a prompt whose prefill is timed must run in one step

Json = dict[str, Any]
Launch = Callable[[Json, Path, str], Json]


class Files(NamedTuple):
    """The paths of the checkpoint, of the engines' files, and of the report, if one is written."""

    model: Path
    logs: Path
    output: Path | None


class NoTimes(Exception):
    """No time may be reported; the message is the reason."""


def points(options: Options, run: int) -> list[Json]:
    """Return the points measured on every engine of a run; cheap and important points come first.

    With --decode-first there are two runs, of small batches and of all else.
    """
    context = options.context
    decode = [{"kind": "decode", "batch": n, "context": context} for n in options.batches]
    capacity = {"kind": "capacity", "context": options.hold}
    others = [{"kind": "prefill", "tokens": options.prefill}, capacity]
    if not options.decode_first:
        return [*decode, *others]
    small = [point for point in decode if point["batch"] <= FIRST_BATCHES]
    return [*(point for point in decode if point not in small), *others] if run % 2 else small


def request(
    name: str, run: int, model: Path, options: Options, results: Json, deadline: float
) -> Json:
    """Return what engine.measure takes, for the variant `name`."""
    settings = {
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "max_model_len": options.max_model_len,
        "max_num_seqs": options.max_seqs,
        "max_num_batched_tokens": max(BATCHED_TOKENS, options.prefill, options.max_model_len),
        "gpu_memory_utilization": options.gpu_memory,
        "enforce_eager": options.eager,
        "seed": 0,
        **VARIANTS[name][1],
        **options.engine,
    }
    if name == "exact_offload" or name in AS_LARGE_AS:
        settings["cpu_offload_gb"] = saved_bytes(AS_LARGE_AS.get(name, "exact"), results) / GIB
    first = results["bf16"][0]["answers"] if results["bf16"] else None
    return {
        "model": str(model),
        "engine": settings,
        "expected": first if name in EXACT else None,
        "vocab_size": options.vocab_size,
        "points": points(options, run),
        "steps": options.steps,
        "hold": options.hold,
        "point_seconds": options.point_seconds,
        "budget": options.budget,
        "deadline": deadline,
        "environment": {},
    }


def reason_against(name: str, options: Options, machine: Json, results: Json) -> str | None:
    """Return the reason why a variant cannot or need not run here, or None."""
    if machine["gpu"] is None:
        if name in AS_LARGE_AS or name == "prefetch":
            return "needs a GPU"
        if name.endswith("fused") and not options.variants_given:
            return "needs a GPU; on a CPU its kernel runs in Triton's interpreter, if --variants names it"
    if name == "exact_offload" or name in AS_LARGE_AS:
        other = AS_LARGE_AS.get(name, "exact")
        if not results[other] or "memory" not in results[other][0]:
            return f"{VARIANTS[other][0]}, whose GPU memory it takes, did not run"
        if not saved_bytes(other, results):
            return "DFloat11 saves nothing on this model, so there is nothing to offload"
    return None


def saved_bytes(name: str, results: Json) -> int:
    """Return how many bytes less of the GPU a variant takes for its weights than BF16."""
    plain, other = (results[which][0]["memory"]["resident_bytes"] for which in ("bf16", name))
    return int(max(0, plain - other))


def judge(name: str, run: int, results: Json) -> None:
    """Raise NoTimes if no time may be reported because of the latest result of BF16 or exact."""
    if name not in EXACT:
        return
    latest, label = results[name][-1], VARIANTS[name][0]
    if "answers" not in latest:
        if run == 0 and name in COMPARED:
            raise NoTimes(f"{label} did not run: {latest.get('error', 'no reason given')}")
        return
    got, expected = tokens(latest["answers"]), tokens(results["bf16"][0]["answers"])
    if got != expected:
        k, i = first_difference(got, expected)
        raise NoTimes(
            f"{label}: token {i} of prompt {k} is {got[k][i]} in run {run + 1}; BF16's is {expected[k][i]}. "
            "DIFFERENT, so no times are reported."
        )


def first_difference(a: list[list[int]], b: list[list[int]]) -> tuple[int, int]:
    """Return prompt and position of the first token that differs."""
    return next((k, i) for k in range(len(a)) for i in range(len(a[k])) if a[k][i] != b[k][i])


def rounds(options: Options) -> Iterator[tuple[int, str]]:
    """Yield (run, variant); every second run is in reverse order, so that no variant is always first or warmest."""
    for run in range(options.runs * (1 + options.decode_first)):
        for name in options.variants[:: -1 if run % 2 and not options.decode_first else 1]:
            yield run, name


def run_all(options: Options, head: Json, files: Files, launch: Launch, until: float) -> Json:
    """Run the engines, store after each the results that may be reported, and return the report."""
    results: Json = {name: [] for name in options.variants}
    skipped: dict[str, str] = {}
    for run, name in rounds(options):
        reason = reason_against(name, options, head["machine"], results) if run == 0 else None
        if time.time() >= until:
            reason = reason or f"the budget of {options.budget:g} s was spent"
        has_failed = bool(results[name]) and "answers" not in results[name][-1]
        if reason or has_failed or name in skipped:
            if run == 0 and name in COMPARED:
                raise NoTimes(f"{VARIANTS[name][0]} did not run: {reason}.")
            if not results[name]:
                skipped.setdefault(name, str(reason))
            continue
        say(f"run {run + 1}: {VARIANTS[name][0]} ...")
        asked = request(name, run, files.model, options, results, until)
        if name == "fused" and head["machine"]["gpu"] is None:
            asked["environment"] = {"VLLM_DFLOAT_BACKEND": "triton", "TRITON_INTERPRET": "1"}
        results[name].append(
            {"engine": asked["engine"], **launch(asked, files.logs, f"{name}-{run + 1}")}
        )
        archive(files.logs, options.logs)
        judge(name, run, results)
        say("    " + report.progress(results[name][-1]))
        if all(results[other] for other in COMPARED if other in results):
            whole = report.assemble(head, results, skipped)
            report.store(whole, files.output)
    return report.assemble(head, results, skipped)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def log_folder(options: Options) -> Iterator[Path]:
    """Yield a folder for the engines' files, which is removed afterwards; --logs keeps the files in an archive."""
    if options.logs:
        make_folder(options.logs.parent, "--logs")
    with tempfile.TemporaryDirectory(prefix="bench-serve-") as folder:
        try:
            yield Path(folder)
        finally:  # also the logs of an engine that was stopped
            archive(Path(folder), options.logs)


def archive(folder: Path, file: Path | None) -> None:
    """Write the engines' files, three per engine, into one archive, as a whole or not at all."""
    if file is None:
        return
    part = file.with_name(f".{file.name}.part")
    with tarfile.open(part, "w:gz") as tar:
        tar.add(folder, ".")
    part.replace(file)


def make_folder(folder: Path, argument: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchError(
            f"{argument} {folder}: {error.strerror}; expected a folder to write to. Name another."
        ) from error


def bench(argv: list[str], launch: Launch | None) -> int:
    """Do what the module says and return the exit status."""
    options = parse(argv)
    launch = launch or (bench_serve_fork if options.fork else bench_serve_launch).launch
    until = time.time() + options.budget
    machine = bench_serve_launch.machine()
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    output = options.output
    if output is None and machine["gpu"]:
        output = report.default_output(machine["gpu"], date)
    if output:
        make_folder(output.parent, "--output")
    head = {
        "date": date,
        "command": shlex.join(["python", "scripts/bench_serve.py", *argv]),
        "machine": machine,
        "model": options.shape,
        "weights": "as in the checkpoint" if options.model else "random, N(0, 0.02)",
        "settings": {
            "mode": _mode(options),
            "fork": options.fork,
            **{key: getattr(options, key) for key in ("hold", "context", "prefill", "runs")},
            **{key: getattr(options, key) for key in ("steps", "max_seqs", "gpu_memory")},
        },
    }
    if options.fork:
        bench_serve_fork.begin()
    with log_folder(options) as logs:
        if options.model is None:
            say(f"weights: {options.folder} (written first, if they are not there)")
        model = bench_serve_launch.weights(options)
        whole = run_all(options, head, Files(model, logs, output), launch, until)
    report.store(whole, output, say)
    print(report.table(whole))
    return 0


def _mode(options: Options) -> str:
    """Return in words how the engines run models."""
    invariant = ", batch-invariant" if os.environ.get("VLLM_BATCH_INVARIANT", "0") == "1" else ""
    if options.eager:
        return f"eager{invariant}"
    compiled = options.engine.get("compilation_config", {}).get("mode", 1) != 0
    return f"{'' if compiled else 'not '}compiled, CUDA graphs{invariant}"


def main(argv: list[str] | None = None, launch: Launch | None = None) -> int:
    """Run the benchmark, with `launch` to start engines if it is given; return the exit status."""
    try:
        return bench(sys.argv[1:] if argv is None else argv, launch)
    except NoTimes as reason:
        say(f"bench_serve: {reason}")
        return 1
    except BenchError as trouble:
        say(f"bench_serve: {trouble}")
        return 2


if __name__ == "__main__":
    for sign in (signal.SIGTERM, signal.SIGHUP):  # leave through `finally`: engines are stopped
        signal.signal(sign, lambda number, _: sys.exit(128 + number))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
