"""A script: compress or decompress repeatedly, each time killed at another point and then run to its end.

python interrupted.py WORK SOURCE FOLDER SEED EVENTS LIMITS: WORK is compress or decompress. Prints a JSON line per run
with the point of the kill, the files at that time, and the contents of the finished folder. A run is killed by signal 9
before the n-th time it opens, renames or removes a file in the target, or during a write by a limit on the size of
files. Runs are forks of this process, which has imported everything.
"""

import json
import os
import random
import resource
import signal
import sys
from pathlib import Path

from vllm_dfloat.checkpoint.folder import FINISHED_FILE
from vllm_dfloat.checkpoint.manifest import file_entry
from vllm_dfloat.convert.compress import compress
from vllm_dfloat.convert.decompress import decompress
from vllm_dfloat.convert.source import open_source

EVENTS = ("open", "os.rename", "os.remove")


def contents(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file except the note with the times of files, which no other run gives again."""
    return {
        path.relative_to(folder).as_posix(): file_entry(path)["sha256"]
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != FINISHED_FILE
    }


def work(name: str, source: Path, target: Path) -> None:
    if name == "compress":
        compress(open_source(source), target)
    else:
        decompress(source, target, shard_bytes=300_000)


def run(name: str, source: Path, target: Path, event: int = 0, limit: int = 0) -> tuple[int, int]:
    """Do the work in a fork; return its exit status and the number of events (0 if it was killed)."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        seen = 0

        def hook(what: str, args: tuple) -> None:
            nonlocal seen
            if what in EVENTS and str(target) in str(args[0]):
                seen += 1
                if seen == event:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        if limit:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            work(name, source, target)
            os.write(writer, str(seen).encode())
        finally:
            os._exit(0)
    os.close(writer)
    status = os.waitpid(child, 0)[1]
    with open(reader) as stream:
        return status, int(stream.read() or 0)


def main(
    name: str, source: Path, folder: Path, seed: int, num_events: int, num_limits: int
) -> None:
    os.environ["VLLM_DFLOAT_THREADS"] = "1"
    work(name, source, folder / "warm")  # the forks inherit what numba loads here
    _, events = run(name, source, folder / "whole")
    whole = contents(folder / "whole")
    print(json.dumps({"events": events, "files": whole}), flush=True)
    choose = random.Random(seed)
    sizes = [(folder / "whole" / file).stat().st_size for file in whole]
    kills = [{"event": n} for n in choose.sample(range(1, events + 1), num_events)]
    kills += [{"limit": choose.randrange(1, max(sizes))} for _ in range(num_limits)]
    for i, kill in enumerate(kills):
        target = folder / str(i)
        status, _ = run(name, source, target, **kill)
        left = sorted(contents(target)) if target.exists() else []
        again, _ = run(name, source, target)
        line = {"kill": kill, "status": status, "left": left, "again": again}
        print(json.dumps({**line, "files": contents(target)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), *map(int, sys.argv[4:]))
