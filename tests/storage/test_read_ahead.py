"""Read-ahead: every byte is requested once, in order, and not too far ahead of the reader."""

import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from dfloat11_helpers import VECTORS

from vllm_dfloat.checkpoint.members import plan, spans
from vllm_dfloat.checkpoint.reader import open_checkpoint
from vllm_dfloat.checkpoint.shapes import model_shapes
from vllm_dfloat.storage import read_ahead
from vllm_dfloat.storage.stored_tensor import StoredTensor

Asked = list[tuple[str, int, int]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    found: Asked = []
    real = read_ahead.will_need

    def spy(file: Path, first: int, size: int) -> None:
        found.append((file.name, first, size))
        real(file, first, size)

    monkeypatch.setattr(read_ahead, "will_need", spy)
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "the threads that read ahead do not come to it"
        time.sleep(0.005)


def tensors(tmp_path: Path, sizes: list[int]) -> list[StoredTensor]:
    file = tmp_path / "weights"
    file.write_bytes(bytes(sum(sizes)))
    begins = np.concatenate(([0], np.cumsum(sizes))).tolist()
    return [
        StoredTensor(file, f"t{i}", "U8", (size,), begin, size)
        for i, (begin, size) in enumerate(zip(begins, sizes, strict=False))
    ]


def test_the_reader_gets_all_pairs_and_every_byte_is_asked_for_once(
    tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "CHUNK_BYTES", 100)
    stored = tensors(tmp_path, [250, 0, 100, 399])
    pairs = [(tensor.name, i) for i, tensor in enumerate(stored)]
    given = []
    for pair in read_ahead.read_ahead(pairs, stored):
        given.append(pair)
        wait_for(lambda: sum(size for *_, size in asked) == 749)
    assert given == pairs
    assert sorted(asked)[0] == ("weights", 0, 100)
    assert len({first for _, first, _ in asked}) == len(asked) == 3 + 1 + 4


def test_the_threads_wait_for_the_reader(
    tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "CHUNK_BYTES", 10)
    monkeypatch.setattr(read_ahead, "AHEAD_BYTES", 50)
    stored = tensors(tmp_path, [30] * 10)
    with read_ahead.ReadAhead(stored) as ahead:
        wait_for(lambda: len(asked) == 5)
        ahead.reached("t2")  # at byte 60: earlier chunks are skipped
        wait_for(lambda: max(first for _, first, _ in asked) == 100)
        assert sorted(first for _, first, _ in asked) == [0, 10, 20, 30, 40, *range(60, 110, 10)]
    wait_for(lambda: not [t for t in threading.enumerate() if t.name == "dfloat11-read-ahead"])


def test_a_file_that_is_gone_does_not_disturb_the_reader(tmp_path: Path) -> None:
    stored = tensors(tmp_path, [30] * 3)
    stored[0].file.unlink()
    pairs = [(tensor.name, None) for tensor in stored]
    assert list(read_ahead.read_ahead(pairs, stored)) == pairs


def test_the_threads_end_when_the_reader_gives_up(tmp_path: Path) -> None:
    stored = tensors(tmp_path, [30] * 3)
    reader = read_ahead.read_ahead([("t0", 0), ("t1", 1)], stored)
    next(reader)
    reader.close()
    wait_for(lambda: not [t for t in threading.enumerate() if t.name == "dfloat11-read-ahead"])


@pytest.mark.parametrize("name", ["llama-tiny", "phi3-tiny-fused"])
def test_the_spans_of_a_compressed_checkpoint_cover_its_files_once(name: str) -> None:
    folder = VECTORS / f"{name}-df11"
    items = plan(open_checkpoint(folder), model_shapes(folder))
    covered: dict[str, list[tuple[int, int]]] = {}
    for span in spans(items):
        covered.setdefault(span.file.name, []).append((span.begin, span.begin + span.num_bytes))
    for file, ranges in covered.items():
        ranges.sort()
        assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(ranges))
        assert ranges[-1][1] == (folder / file).stat().st_size
