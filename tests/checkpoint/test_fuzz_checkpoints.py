"""The fuzz run: 2,000 damaged checkpoints, and checks that it damages files and detects wrong behaviour."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from fuzz import case as fuzz_case
from fuzz.bases import Base, make_bases
from fuzz.case import ROOM, damaged, run_case, self_check
from fuzz.folder import Folder, Special, unpack, weight_files
from fuzz.mutations import MUTATIONS
from fuzz.supervise import supervise

SCRIPT = Path(__file__).parents[2] / "scripts" / "fuzz_checkpoints.py"
CASES, SEED = 2000, 0


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[Base]:
    folder = tmp_path_factory.mktemp("fuzz")
    made = make_bases(folder / "bases")
    self_check(made, folder)
    return made


@pytest.fixture(scope="module")
def folders(bases: list[Base]) -> list[Folder]:
    """Return the files of every case of the run below, and further cases of mutations that have many forms."""
    found = [damaged(number, SEED, bases)[1] for number in range(CASES)]
    more = {
        "lie in the index": bases[-1],
        "lie in the manifest": bases[-2],
        "rename a tensor": bases[0],
    }
    for kind, base in more.items():
        for seed in range(1000):
            found.append(dict(base.files))
            MUTATIONS[kind](found[-1], Random(seed))
    return found


def test_2000_damaged_checkpoints_are_refused_or_decode_to_what_their_bytes_say(
    tmp_path: Path,
) -> None:
    command = [sys.executable, str(SCRIPT), "--count", str(CASES), "--seed", str(SEED)]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "counts.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert sum(counts["results"].values()) == CASES
    assert (
        counts["results"]["decoded"] > CASES // 20
    )  # damage that no check can detect, or that changes nothing
    assert counts["mutations"].keys() == MUTATIONS.keys()
    assert all(kind["refused"] > 0 for kind in counts["mutations"].values())


@pytest.mark.parametrize("kind", MUTATIONS)
def test_every_mutation_changes_a_checkpoint(kind: str, bases: list[Base]) -> None:
    changed = 0
    for seed in range(20):
        for base in bases:
            folder = dict(base.files)
            applied = MUTATIONS[kind](folder, Random(seed))
            changed += applied and folder != base.files
    assert changed >= 15


def test_flipped_bits_reach_every_tensor(bases: list[Base]) -> None:
    def contents(folder: Folder) -> dict[tuple[str, str], bytes]:
        return {
            (name, tensor.name): tensor.data
            for name in weight_files(folder)
            for tensor in unpack(folder[name])
        }

    for base in bases:
        before, reached = contents(base.files), set()
        for seed in range(600):
            folder = dict(base.files)
            MUTATIONS["flip bits in a tensor"](folder, Random(seed))
            reached |= {key for key, data in contents(folder).items() if data != before[key]}
        assert reached == {key for key, data in before.items() if data}, base.name


def text_of(folder: Folder, ending: str = "") -> bytes:
    """Return the plain files of these names, headers included, one after the other."""
    parts = (c for n, c in folder.items() if n.endswith(ending) and isinstance(c, bytes))
    return b"\n".join(parts)


def special(kind: str, content: bytes = b"") -> Callable[[Folder], bool]:
    return lambda folder: any(
        isinstance(c, Special) and c.kind == kind and content in c.content for c in folder.values()
    )


def holds(text: bytes, ending: str = "") -> Callable[[Folder], bool]:
    return lambda folder: text in text_of(folder, ending)


def matches(pattern: bytes, ending: str = "") -> Callable[[Folder], bool]:
    return lambda folder: re.search(pattern, text_of(folder, ending)) is not None


DAMAGE: dict[str, Callable[[Folder], bool]] = {
    "pipe": special("pipe"),
    "folder in place of a file": special("folder"),
    "link to itself": lambda f: any(
        isinstance(c, Special) and c.kind == "link" and c.content == os.fsencode(n)
        for n, c in f.items()
    ),
    "dangling link": special("link", b"nowhere"),
    "link to a folder": special("link", b".."),
    "link to an endless device": special("link", b"/dev/zero"),
    "sparse file": special("sparse"),
    "empty file": lambda f: b"" in f.values(),
    "name that is no UTF-8": lambda f: any("\udcff" in name for name in f),
    "long file name": lambda f: any(len(name) > 250 for name in f),
    "line end in a file name": lambda f: any("\n" in name for name in f),
    "NaN in config.json": holds(b"NaN", "config.json"),
    "infinity in config.json": holds(b"Infinity", "config.json"),
    "number that overflows": holds(b"1e999"),
    "number of 5000 digits": holds(b"9" * 5000),
    "NaN in a header": holds(b"NaN", ".safetensors"),
    "deep nesting in config.json": holds(b"[" * 300, "config.json"),
    "deep nesting in a header": holds(b"[" * 300, ".safetensors"),
    "2**62 in a header": holds(str(1 << 62).encode(), ".safetensors"),
    "negative shape": matches(rb'"shape": \[?-1', ".safetensors"),
    "float in a shape": matches(rb'"shape": \[?\d*\.', ".safetensors"),
    "boolean in a shape": matches(rb'"shape": \[?(?:true|false)', ".safetensors"),
    "2**62 in split_positions": holds((1 << 62).to_bytes(8, "little"), ".safetensors"),
    "path out of the folder in the index": holds(b'"../config.json"', "index.json"),
    "absolute path in the index": holds(b'"/etc/passwd"', "index.json"),
    "NUL in the index": holds(b'a\\u0000b"', "index.json"),
    "long path in the index": holds(b"x" * 5000, "index.json"),
    "path out of the folder in the manifest": holds(b'"a/../../b"', "manifest.json"),
    "absolute path in the manifest": holds(b'"/etc/passwd"', "manifest.json"),
    "lone surrogate in the manifest": holds(b'"\\ud800"', "manifest.json"),
    "negative size in the manifest": holds(b'"bytes": -1', "manifest.json"),
    "wrong digest in the manifest": holds(b"0" * 64, "manifest.json"),
    "regex that repeats a repetition": holds(b"(a+)+$", "config.json"),
    "regex with 2**30 ways": holds(b"(?:a|aa)" * 30, "config.json"),
    "300 patterns": matches(rb'299": \[\]', "config.json"),
    "list of weights with a number": matches(rb"\[5[,\]]|, 5[,\]]", "config.json"),
    "weight listed twice": holds(b'["a", "a"', "config.json"),
    "tensor name with a NUL": holds(b"a\\u0000b", ".safetensors"),
    "tensor name of 6000 characters": holds(b"a." * 3000, ".safetensors"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_the_run_holds_every_kind_of_damage(name: str, folders: list[Folder]) -> None:
    assert any(DAMAGE[name](folder) for folder in folders)


def test_mutations_are_stacked_and_a_case_is_the_same_every_time(bases: list[Base]) -> None:
    kinds = [damaged(number, SEED, bases)[2] for number in range(200)]
    assert {len(kind) for kind in kinds} >= {1, 2, 3, 5}
    assert damaged(7, 1, bases)[1:] == damaged(7, 1, bases)[1:]
    assert damaged(7, 1, bases)[1] != damaged(7, 2, bases)[1]


def ending(number: int, _worker: int) -> dict[str, Any]:
    """End in each way that a case can: normally, by a kill of the process, by a hang, or by an error of the harness."""
    if number == 3:
        os.kill(os.getpid(), 9)
    if number == 5:
        os.read(os.pipe()[0], 1)
    if number == 6:
        raise RuntimeError("harness")
    return {"number": number, "result": "refused"}


def test_a_case_that_dies_or_hangs_is_reported_and_no_other_is_lost(
    capfd: pytest.CaptureFixture[str],
) -> None:
    reports = {r["number"]: r for r in supervise(ending, range(12), 2, wall_seconds=2.0)}
    assert sorted(reports) == list(range(12))
    wrong = {number: r["told"] for number, r in reports.items() if r["result"] == "wrong"}
    assert wrong == {
        3: "its process ended with -9",
        5: "did not end in 2.0 s",
        6: "its process ended with 1",
    }


@pytest.fixture(scope="module")
def first(bases: list[Base], tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Return the number of the first case that is refused, and of the first that decodes."""
    work = tmp_path_factory.mktemp("first")
    results = [run_case(number, SEED, bases, work).result for number in range(30)]
    return {result: results.index(result) for result in ("refused", "decoded")}


def allocate(folder: Path) -> None:
    np.zeros(ROOM + (200 << 20), np.uint8)


def spin(folder: Path) -> None:
    began = time.process_time()
    while time.process_time() - began < 10:
        pass


def raise_another(folder: Path) -> None:
    raise KeyError("a name")


def refuse_without_a_file(folder: Path) -> None:
    raise fuzz_case.DFloatError("something is wrong.")


def accept(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("reader", "told"),
    [
        (allocate, "MemoryError"),
        (spin, "over 1.0 s of CPU time"),
        (raise_another, "KeyError"),
        (refuse_without_a_file, "names no file at its beginning"),
        (accept, "verify"),
    ],
)
def test_a_reader_that_does_what_it_must_not_is_found(
    reader: Callable[[Path], None],
    told: str,
    bases: list[Base],
    first: dict[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    number = first["refused" if reader is accept else "decoded"]
    monkeypatch.setattr(fuzz_case, "check", reader)
    outcome = run_case(number, SEED, bases, tmp_path)
    assert outcome.result == "wrong"
    assert told in outcome.told


def test_a_reader_that_gives_out_other_bits_is_found(
    bases: list[Base],
    first: dict[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = fuzz_case._decoded

    def one_bit_off(*arguments: Any) -> Any:
        found = given(*arguments)
        name = next(name for name, (_, data) in found.items() if data)
        dtype, data = found[name]
        return found | {name: (dtype, bytes([data[0] ^ 1]) + data[1:])}

    monkeypatch.setattr(fuzz_case, "_decoded", one_bit_off)
    outcome = run_case(first["decoded"], SEED, bases, tmp_path)
    assert outcome.result == "wrong"
    assert "1 tensors are not what the bytes say" in outcome.told
