"""Serve BF16 and DFloat11 with `vllm serve` and ask with `vllm bench serve`, by the protocol that others publish.

    python scripts/bench_online.py --shape llama-3.1-8b --folder FOLDER --output FILE.json
    python scripts/bench_online.py --model PATH --rates 1,4,inf      # a checkpoint with its tokenizer

Random prompts of 1,024 tokens, 256 tokens of answer, end-of-sequence ignored, at 1 and 4 requests a second and all at
once; BF16 is measured once more at the end. Per engine and rate: time to the first token (TTFT) and per further token
(TPOT), mean and 99th percentile, requests and tokens a second, the KV cache, and the GPU's clock and power meanwhile.
Exit status: 0 measured; 1 an engine or a rate did not run; 2 bad input.
"""

import argparse
import asyncio
import datetime
import json
import os
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.online.server import Server, ServerError, write_tokenizer
from bench.online.watch import Watch
from bench.serve import half_fast, launch
from bench.serve.model import SHAPES, BenchError, read_config
from bench.serve.options import VARIANTS

Json = dict[str, Any]
KEPT = (
    "completed", "failed", "request_throughput", "output_throughput", "mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms",
    "p99_tpot_ms",
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = p.add_argument
    add("--shape", choices=SHAPES, default="llama-3.1-8b", help="random weights of this shape")
    add("--folder", type=Path, help="where random weights lie, or are written to once")
    add("--model", type=Path, help="a BF16 checkpoint to serve instead")
    default = "bf16,exact,fast_exact,fast_fused,auto"
    add("--variants", default=default, help=f"of {', '.join(VARIANTS)}")
    add("--rates", default="1,4,inf", help="requests a second; inf: all at once")
    add(
        "--seconds",
        type=float,
        default=20,
        help="of a rate: as many requests as it sends meanwhile",
    )
    add("--prompts", type=int, default=128, help="requests at rate inf, and at most at others")
    add("--input-len", type=int, default=1024, help="tokens of a prompt")
    add("--output-len", type=int, default=256, help="tokens of an answer")
    add("--engine", default="{}", help="JSON: further arguments of `vllm serve`")
    add("--budget", type=float, default=3600, help="seconds; no engine or rate begins after them")
    add("--output", type=Path, help="FILE.json")
    add("--logs", type=Path, help="a folder that keeps the servers' logs")
    return p


def prompts_of(rate: str, args: argparse.Namespace) -> int:
    """Return how many requests are sent at a rate."""
    if rate == "inf":
        return int(args.prompts)
    return max(1, min(args.prompts, round(float(rate) * args.seconds)))


def ask(server: Server, model: Path, rate: str, args: argparse.Namespace) -> Json:
    """Run `vllm bench serve` once, in this process, and return what it measured."""
    from vllm.benchmarks.serve import add_cli_args, main_async

    p = argparse.ArgumentParser()
    add_cli_args(p)
    command = [
        "--backend", "openai", "--base-url", server.url, "--model", str(model), "--dataset-name", "random",
        "--random-input-len", str(args.input_len), "--random-output-len", str(args.output_len), "--ignore-eos",
        "--request-rate", rate, "--num-prompts", str(prompts_of(rate, args)), "--percentile-metrics", "ttft,tpot",
        "--metric-percentiles", "99", "--seed", "0", "--num-warmups", "2", "--disable-tqdm",
    ]  # fmt: skip
    with Watch() as watch:
        found = asyncio.run(main_async(p.parse_args(command)))
    kept = {key: found[key] for key in KEPT if key in found}
    return {
        "rate": rate,
        **kept,
        **watch.summary(),
        "command": shlex.join(["vllm bench serve", *command]),
    }


def measure(name: str, model: Path, args: argparse.Namespace, logs: Path, until: float) -> Json:
    """Serve one variant and ask at every rate; `error` says why something is missing."""
    label, settings = VARIANTS[name]
    engine = {
        "max_model_len": args.input_len + args.output_len + 64,
        "dtype": "bfloat16",
        "enable_prefix_caching": False,
        **settings,
        **json.loads(args.engine),
    }
    result: Json = {"variant": name, "label": label, "rates": []}
    begun = time.monotonic()
    log = logs / f"{len(list(logs.iterdir()))}-{name}.log"
    try:
        if half_fast.is_wanted(engine):
            engine, result["choice"] = half_fast.with_half_fast(model, engine)
            begun = time.monotonic()
        with Server(model, engine, log) as server:
            server.wait_until_ready(until)
            result |= {
                "start_seconds": round(time.monotonic() - begun, 1),
                "kv_cache_tokens": server.kv_cache_tokens(),
            }
            for rate in args.rates.split(","):
                if time.time() >= until:
                    raise ServerError(
                        f"the budget of {args.budget:g} s was spent before rate {rate}"
                    )
                result["rates"].append(found := ask(server, model, rate, args))
                if found.get("failed") or found["completed"] != prompts_of(rate, args):
                    raise ServerError(
                        f"rate {rate}: {found['completed']} requests were answered, not all"
                    )
    except (ServerError, OSError, ValueError) as error:
        result["error"] = str(error)
    return result


def table(results: list[Json]) -> str:
    """Return one line per engine and rate."""
    head = [
        "engine",
        "KV tokens",
        "rate",
        "req/s",
        "tokens/s",
        "TTFT mean",
        "p99 ms",
        "TPOT mean",
        "p99 ms",
        "MHz",
        "W",
    ]
    rows = [head]
    for result in results:
        for found in result["rates"]:
            tokens = result["kv_cache_tokens"]
            rows.append(
                [
                    result["label"],
                    f"{tokens:,}" if tokens else "-",
                    found["rate"],
                    *map(_cell, _values(found)),
                ]
            )
        if "error" in result:
            rows.append([result["label"], f"not measured: {result['error']}"])
    widths = [max(len(row[i]) for row in rows if len(row) == len(head)) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()
        for row in rows
    )


def _values(found: Json) -> list[float | None]:
    names = (
        "request_throughput", "output_throughput", "mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "p99_tpot_ms", "mhz",
        "watts",
    )  # fmt: skip
    return [found.get(name) for name in names]


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def checked(argv: list[str] | None) -> argparse.Namespace:
    """Return the arguments; raise BenchError for some that cannot work."""
    args = parser().parse_args(argv)
    names = args.variants.split(",")
    if unknown := [
        name for name in names if name not in VARIANTS or "offload" in name or "prefetch" in name
    ]:
        raise BenchError(
            f"--variants: {unknown[0]!r}; expected some of {', '.join(VARIANTS)} without offload and prefetch."
        )
    args.names = [
        *dict.fromkeys(["bf16", *names]),
        "bf16",
    ]  # again at the end: a GPU that got warm would show
    for rate in args.rates.split(","):
        if not (rate == "inf" or (rate.replace(".", "", 1).isdigit() and float(rate) > 0)):
            raise BenchError(
                f"--rates {args.rates}: expected numbers over 0, or inf, with commas between them."
            )
    if not args.model and not args.folder:
        raise BenchError(
            "--folder: missing; expected a folder for random weights, or --model. Name one."
        )
    try:
        assert isinstance(json.loads(args.engine), dict)
    except (ValueError, AssertionError):
        raise BenchError(f"--engine {args.engine}: expected a JSON object.") from None
    return args


def main(argv: list[str] | None = None) -> int:
    try:
        args = checked(argv)
        if args.model:
            read_config(args.model)
        model = launch.weights(args)  # in a process of its own: this one needs no GPU
        if not args.model:
            write_tokenizer(model, SHAPES[args.shape]["vocab_size"])
    except BenchError as trouble:
        print(f"bench_online: {trouble}", file=sys.stderr)
        return 2
    for name, value in launch.QUIET.items():
        os.environ.setdefault(name, value)
    until = time.time() + args.budget
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    command = shlex.join(["python", "scripts/bench_online.py", *(argv or sys.argv[1:])])
    machine = launch.machine()
    is_rehearsal = machine.get("gpu") is None
    whole: Json = {
        "date": date,
        "command": command,
        "machine": machine,
        "is_rehearsal": is_rehearsal,
        "results": [],
    }
    with tempfile.TemporaryDirectory() as scratch:
        logs = args.logs or Path(scratch)
        logs.mkdir(parents=True, exist_ok=True)
        for name in args.names:
            if time.time() < until:
                print(f"serving {VARIANTS[name][0]} ...", file=sys.stderr, flush=True)
                whole["results"].append(measure(name, model, args, logs, until))
            else:
                error = f"the budget of {args.budget:g} s was spent"
                whole["results"].append(
                    {"variant": name, "label": VARIANTS[name][0], "rates": [], "error": error}
                )
            if args.output:
                args.output.write_text(json.dumps(whole, indent=1) + "\n")
    if is_rehearsal:
        print("REHEARSAL ON A CPU: these times say nothing about a GPU.")
    print(table(whole["results"]))
    return int(any("error" in result for result in whole["results"]))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # servers are stopped
    sys.exit(main())
