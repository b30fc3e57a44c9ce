"""One case of a fuzz run: damage a checkpoint, read it, and judge the outcome."""

from __future__ import annotations

import io
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import fuzz.mutations_files  # each registers its mutations
import fuzz.mutations_json
import fuzz.mutations_tensors  # noqa: F401
from fuzz.bases import Base
from fuzz.folder import Folder, write_folder
from fuzz.mutations import MUTATIONS
from fuzz.oracle import (
    StoredTwice,
    Tensors,
    expected_tensors,
    listed_shapes,
    manifest_holds,
    original_tensors,
)

from vllm_dfloat.checkpoint.folder import is_dfloat11
from vllm_dfloat.checkpoint.plain_model import bf16_tensors
from vllm_dfloat.checkpoint.reader import open_checkpoint
from vllm_dfloat.checkpoint.verify import check
from vllm_dfloat.checkpoint.weights import typed_weights
from vllm_dfloat.cli import main
from vllm_dfloat.commands import progress
from vllm_dfloat.errors import MAX_MESSAGE, DFloatError, one_line

progress.tells_compiling = False  # stderr must not depend on numba's cache
CPU_SECONDS = 1.0  # limit for the reader and all commands of a case together
# Limit of additional address space: a fixed part, and per byte of the files the memory of parsed JSON.
ROOM, ROOM_PER_BYTE = 32 << 20, 64
MAX_LINE = MAX_MESSAGE + 200


_NOT_APPLICABLE = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    RecursionError,
    OverflowError,
)


class Wrong(Exception):
    """The package behaved wrongly."""


class TooSlow(BaseException):
    """The case exceeded its CPU time. A BaseException, so that no handler of the package catches it."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a case.

    Attributes:
        number, base: number of the case, and name of the damaged base.
        kinds: the mutations, in order.
        result: "refused", "decoded" (to the weights that the bytes describe), or "wrong".
        told: the message of the refusal, or a description of the error.
    """

    number: int
    base: str
    kinds: tuple[str, ...]
    result: str
    told: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def damaged(number: int, seed: int, bases: Sequence[Base]) -> tuple[Base, Folder, tuple[str, ...]]:
    """Return the base of a case, its damaged files, and the mutations; the same for the same number and seed."""
    rng = Random(f"{seed} {number}")
    base = rng.choices(bases, [base.share for base in bases])[0]
    folder = dict(base.files)
    kinds: list[str] = []
    wanted = rng.choice((1, 1, 1, 2, 3, 5))
    for _ in range(50):  # not every mutation applies to every folder
        kind = rng.choice(sorted(MUTATIONS))
        try:
            applied = MUTATIONS[kind](folder, rng)
        except _NOT_APPLICABLE:  # earlier damage left nothing that this mutation can parse
            continue
        if applied:
            kinds.append(kind)
        if len(kinds) == wanted:
            break
    return base, folder, tuple(kinds)


def run_case(number: int, seed: int, bases: Sequence[Base], work: Path) -> Outcome:
    """Run a case in this process, in the folder `work`; what is wrong is reported, not raised."""
    base, folder, kinds = damaged(number, seed, bases)
    target = work / "target"
    num_bytes = write_folder(folder, target)
    try:
        told = _judge(target, base, Limits(num_bytes), [*folder, *base.files])
        return Outcome(number, base.name, kinds, "refused" if told else "decoded", told)
    except Wrong as error:
        return Outcome(number, base.name, kinds, "wrong", str(error))
    except TooSlow:
        return Outcome(number, base.name, kinds, "wrong", f"over {CPU_SECONDS} s of CPU time")
    except BaseException:  # any exception of the package
        return Outcome(number, base.name, kinds, "wrong", traceback.format_exc())


class Limits:
    """Limits the memory of each enclosed piece of code, and the CPU time of all of them together."""

    def __init__(self, num_bytes: int) -> None:
        self.cpu_seconds = CPU_SECONDS
        self._room = ROOM + ROOM_PER_BYTE * num_bytes

    @contextmanager
    def __call__(self) -> Iterator[None]:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        top = pages * resource.getpagesize() + self._room
        began = time.process_time()
        signal.signal(signal.SIGPROF, _too_slow)
        resource.setrlimit(resource.RLIMIT_AS, (top, resource.RLIM_INFINITY))
        signal.setitimer(signal.ITIMER_PROF, max(0.001, self.cpu_seconds))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            self.cpu_seconds -= time.process_time() - began


def _too_slow(*_: object) -> None:
    raise TooSlow


def _judge(target: Path, base: Base, limits: Limits, names: Sequence[str]) -> str:
    """Return the sentence that refuses the checkpoint, "" if it decodes as it must.

    Raises:
        Wrong: the reader or a command did something else.
    """
    refused = ""
    try:
        with limits():
            check(target)
    except DFloatError as error:
        refused = str(error)
    status, out = command(limits, "verify", str(target))
    inspected, _ = command(limits, "inspect", str(target))
    if refused:
        _check_sentence(refused, target, names)
        if status != 2 or one_line(refused) not in out:
            raise Wrong(f"the reader says {refused!r}; verify exits with {status}: {out!r}")
        return refused
    if inspected:
        raise Wrong(f"verify decodes it, and inspect exits with {inspected}")
    expected = expected_tensors(target)
    found = _decoded(target, limits)
    wrong = sorted(
        name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
    )
    if wrong:
        raise Wrong(f"{len(wrong)} tensors are not what the bytes say, the first {wrong[0]!r}")
    holds = manifest_holds(target)
    if status == 2 and "dfloat11_manifest.json" in out:
        return out
    if status != int(not holds):
        raise Wrong(f"the manifest holds: {holds}; verify exits with {status}: {out!r}")
    _check_comparison(target, base, limits)
    return ""


def _decoded(target: Path, limits: Limits) -> Tensors:
    """Return the tensors from the reader under test."""
    with limits():
        if is_dfloat11(target):
            items = typed_weights(open_checkpoint(target))
            return {name: (dtype, bits.tobytes()) for name, dtype, bits in items}
        tensors = bf16_tensors(target)
        return {name: (tensor.dtype, tensor.bits().tobytes()) for name, tensor in tensors.items()}


def _check_comparison(target: Path, base: Base, limits: Limits) -> None:
    """Let verify compare with the original, and check its answer."""
    originals = original_tensors(base.original)
    stored = bf16_tensors(target) if not is_dfloat11(target) else open_checkpoint(target).plain
    modules = {name.removesuffix(".weight") for name in originals}
    try:
        expected = expected_tensors(target, modules)
    except StoredTwice:  # only the names in the original show this
        expected = {}
    equal = expected == {name: (dtype, data) for name, (dtype, _, data) in originals.items()}
    equal = equal and all(
        tensor.shape == originals[name][1] for name, tensor in stored.items() if name in originals
    )
    # Shapes that the format does not store are those of the manifest.
    equal = equal and all(
        tuple(shape) == originals[name][1]
        for name, shape in listed_shapes(target).items()
        if name in originals
    )
    status, out = command(limits, "verify", str(target), "--against", str(base.original))
    if (status == 0) != equal:
        raise Wrong(f"equal to the original: {equal}; verify --against exits with {status}: {out}")


def command(limits: Limits, *arguments: str) -> tuple[int, str]:
    """Run vllm-dfloat in this process; return its exit status and what it printed.

    Raises:
        Wrong: output with control characters or of a wrong form, or a status that contradicts the output.
    """
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2)]
    saved = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = streams
    try:
        with limits():
            status = main(arguments)
            for stream in streams:
                stream.flush()
    finally:
        sys.stdout, sys.stderr = saved
    out, err = (stream.buffer.getvalue().decode() for stream in streams)
    lines = [*out.splitlines(), *err.splitlines()]
    if status not in (0, 1, 2) or bool(err) != (status == 2):
        raise Wrong(f"{arguments[0]} exits with {status} and prints {err!r}")
    if "internal error" in err or "out of memory" in err:
        raise Wrong(f"{arguments[0]}: {err!r}")
    if err and (len(err.splitlines()) != 1 or not err.startswith("vllm-dfloat: ")):
        raise Wrong(f"{arguments[0]} prints no single sentence: {err!r}")
    bad = [line for line in lines if len(line) > MAX_LINE or not line.isprintable()]
    if bad:
        raise Wrong(f"{arguments[0]} prints a line of {len(bad[0])} characters: {bad[0][:200]!r}")
    return status, out + err


def _check_sentence(text: str, target: Path, names: Sequence[str]) -> None:
    if not text.isprintable() or len(text) > MAX_MESSAGE or not text.endswith("."):
        raise Wrong(f"no sentence of at most {MAX_MESSAGE} characters: {text!r}")
    known = [str(target), *(one_line(name)[:20] for name in names)]
    if not any(text.startswith(name) for name in known):
        raise Wrong(f"names no file at its beginning: {text!r}")


def self_check(bases: Sequence[Base], work: Path) -> None:
    """Check that every base without damage decodes and equals its original. Also compiles the code that cases run.

    Raises:
        Wrong: a base does not.
    """
    for base in bases:
        write_folder(base.files, work / "target")
        limits = Limits(1 << 40)
        limits.cpu_seconds = 1000.0  # the first run compiles
        told = _judge(work / "target", base, limits, list(base.files))
        status, out = command(
            limits, "verify", str(work / "target"), "--against", str(base.original)
        )
        if told or status:
            raise Wrong(f"{base.name}: intact, and not accepted: {told or out}")
