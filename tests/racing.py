"""A script: several processes compress into one folder at once, some of them are killed; prints the outcome as JSON.

python racing.py FOLDER SEED ROUNDS SOURCE SOURCE: in each round three forks of this process, which has imported
everything, begin at about the same time, each with one of the sources, with or without --force. A fork looks at the
folder before each removal of a journal; at the last one its work is done and the folder still locked. A line per
round: how each fork ended, what it saw last or printed, the files left, and the result of a forced run after it.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from interrupted import EVENTS, contents

from vllm_dfloat.convert.compress import compress
from vllm_dfloat.convert.resume import COMPRESSION
from vllm_dfloat.convert.source import open_source
from vllm_dfloat.errors import DFloatError

WAS_FINISHED = "was finished before"


def start(source: Path, target: Path, force: bool, delay: float, kill_at: int) -> tuple[int, int]:
    """Return a fork that compresses `source`, and a pipe on which it reports what it has finished."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    seen = 0
    journal = str(target / COMPRESSION.journal)

    def hook(what: str, args: tuple) -> None:
        nonlocal seen
        if what not in EVENTS or str(target) not in str(args[0]):
            return
        seen += 1
        if seen == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "os.remove" and str(args[0]) == journal and (target / "config.json").exists():
            finished = {**contents(target)}
            finished.pop(COMPRESSION.journal)
            os.write(writer, f"{json.dumps(finished)}\n".encode())

    status = 1
    try:
        time.sleep(delay)
        opened = open_source(source)
        sys.addaudithook(hook)
        if compress(opened, target, force).was_finished:
            os.write(writer, f"{json.dumps(WAS_FINISHED)}\n".encode())
        status = 0
    except DFloatError as error:
        os.write(writer, f"{json.dumps(str(error))}\n".encode())
        status = 2
    except Exception:
        os.write(writer, f"{json.dumps(traceback.format_exc())}\n".encode())
    finally:
        os._exit(status)


def race(choose: random.Random, sources: list[Path], target: Path) -> list[dict[str, object]]:
    forks = []
    for _ in range(3):
        source = choose.choice(sources)
        kill_at = choose.randrange(1, 60) if choose.random() < 0.3 else 0
        force, delay = choose.random() < 0.7, choose.random() * 0.05
        forks.append((source, force, *start(source, target, force, delay, kill_at)))
    ended = []
    for source, force, child, reader in forks:
        with open(reader) as stream:
            told = [json.loads(line) for line in stream]
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        ended.append({"source": str(source), "force": force, "status": status, "told": told[-1:]})
    return ended


def main(folder: Path, seed: int, rounds: int, sources: list[Path]) -> None:
    os.environ["VLLM_DFLOAT_THREADS"] = "1"
    whole = {}
    for source in sources:
        compress(open_source(source), folder / f"whole-{source.name}")
        whole[str(source)] = contents(folder / f"whole-{source.name}")
    print(json.dumps(whole), flush=True)
    choose = random.Random(seed)
    for i in range(rounds):
        target = folder / str(i)
        ended = race(choose, sources, target)
        left = contents(target) if target.exists() else {}
        compress(open_source(sources[0]), target, force=True)
        line = {"ended": ended, "left": left, "again": contents(target)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), [Path(a) for a in sys.argv[4:]])
