"""Start engines as forks of a process that has imported vLLM: an import takes 20 s on a GPU host, each time.

That process makes no CUDA call. Engines are forks of it, with sessions, logs and results of their own, as launch.py's.
"""

import os
import sys
from multiprocessing import forkserver, get_context
from pathlib import Path

from bench.serve import engine
from bench.serve.launch import QUIET, SCRIPTS, Json, Started, finish

PRELOADED = "bench.serve.preload"


def begin() -> None:
    """Start to import vLLM in the background; engines inherit this process's environment."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    # Not every Python gives sys.path to the process that imports.
    found = [str(SCRIPTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(found)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    get_context("forkserver").set_forkserver_preload([PRELOADED])
    forkserver.ensure_running()


def serve(request: str, result: str, log: str) -> None:
    """Run one engine in this process, whose output goes to `log`."""
    os.setsid()
    with Path(log).open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    if torch.cuda._is_in_bad_fork():  # an import has made a CUDA call after all: start afresh
        os.execv(sys.executable, [sys.executable, "-P", "-m", engine.__name__, request, result])
    engine.main(request, result)


def launch(request: Json, folder: Path, name: str) -> Json:
    """Do what launch.launch does; an engine that needs an environment of its own is no fork."""
    if request["environment"]:
        from bench.serve import launch as fresh

        return fresh.launch(request, folder, name)
    return finish(request, folder, name, _start)


def _start(paths: list[Path]) -> Started:
    process = get_context("forkserver").Process(target=serve, args=tuple(map(str, paths)))
    process.start()

    def wait(seconds: float) -> int | None:
        process.join(seconds)
        return process.exitcode

    assert process.pid is not None
    return Started(process.pid, wait)
