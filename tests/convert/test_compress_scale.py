"""Compressing large models: memory does not grow with a unit, progress is shown within it, and Ctrl-C ends it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from helpers import gaussian
from interrupted import contents

from vllm_dfloat.checkpoint.verify import compare
from vllm_dfloat.convert.compress import compress
from vllm_dfloat.convert.cores import WORKER_BYTES, share_cores
from vllm_dfloat.convert.resume import COMPRESSION
from vllm_dfloat.convert.source import open_source
from vllm_dfloat.dfloat11.coder import CpuCoder
from vllm_dfloat.dfloat11.unit import Unit
from vllm_dfloat.errors import FormatError
from vllm_dfloat.storage.pieces import read_pieces
from vllm_dfloat.storage.safetensors_read import read_header
from vllm_dfloat.storage.safetensors_write import TEMPORARY, Item, write_safetensors

MIB = 1 << 20


def make_layers(path: Path, layers: int, mebibytes: int) -> Path:
    """Write a model whose layers have two weights each, made of one repeated mebibyte of random weights."""
    path.mkdir()
    block = gaussian(512, 1024)
    shape = (512 * mebibytes // 2, 1024)
    items = [
        Item(f"model.layers.{i}.{name}.weight", "BF16", shape, lambda: [block] * (mebibytes // 2))
        for i in range(layers)
        for name in ("self_attn.q_proj", "mlp.up_proj")
    ]
    write_safetensors(path / "model.safetensors", items)
    (path / "config.json").write_text("{}")
    return path


MEASURE = """
import json, sys
from pathlib import Path
from vllm_dfloat.convert.compress import compress
from vllm_dfloat.convert.resume import COMPRESSION
from vllm_dfloat.convert.source import open_source

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return [int(line.split()[1]) >> 10 for line in lines if line.startswith(("RssAnon", "RssFile"))]

small, large, out = map(Path, sys.argv[1:])
compress(open_source(small), out / "small-df11")  # loads everything
before = resident()
seen = []
compress(open_source(large), out / "large-df11", advance=lambda count: seen.append(resident()))
grown = [max(column) - start for column, start in zip(zip(*seen), before)]
status = Path("/proc/self/status").read_text()
peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
print(json.dumps([*grown, peak << 10]))
"""


def test_memory_stays_bounded_whatever_the_size_of_a_unit(tmp_path: Path) -> None:
    # Bug caught: codes, signs and mantissas of a whole unit in memory: 172 MiB here, 4.3 GB for a layer of a 405B.
    small = make_layers(tmp_path / "small", layers=1, mebibytes=2)
    large = make_layers(tmp_path / "large", layers=1, mebibytes=256)
    command = [sys.executable, "-c", MEASURE, str(small), str(large), str(tmp_path)]
    environment = {**os.environ, "VLLM_DFLOAT_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    anonymous, mapped, peak = json.loads(run.stdout)
    assert peak < WORKER_BYTES
    gaps = 0.0135 * 256
    assert anonymous < gaps + 16
    assert mapped < 16  # files are read


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_moves_within_a_unit_and_ends_with_all_bytes(tmp_path: Path, workers: int) -> None:
    model = make_layers(tmp_path / "m", layers=2, mebibytes=16)
    size = 2 * 16 * MIB
    totals, at = [], [0]
    compress(
        open_source(model),
        tmp_path / "t",
        workers=workers,
        start=lambda total, done: totals.append((total, done)),
        advance=lambda count: at.append(at[-1] + count),
    )
    assert totals == [(size, 0)]
    assert at[-1] == size
    steps = [after - before for before, after in pairwise(at)]
    assert min(steps) >= 0
    if workers == 1:  # with more, how often depends on how fast they are
        assert max(steps) <= 2 * MIB


def test_threads_with_a_coder_write_the_same_files_and_report_all_bytes(tmp_path: Path) -> None:
    model = make_layers(tmp_path / "m", layers=5, mebibytes=4)
    source = open_source(model)
    compress(source, tmp_path / "one")
    seen: list[int] = []
    compress(source, tmp_path / "many", workers=3, advance=seen.append, coder=CpuCoder())
    assert sum(seen) == 5 * 4 * MIB
    left, right = tmp_path / "one", tmp_path / "many"
    assert contents(left) == contents(right)


def test_an_error_in_one_thread_ends_the_others_and_leaves_nothing_half_written(
    tmp_path: Path,
) -> None:
    class Broken(CpuCoder):
        def equals(self, unit: Unit, start: int, weights: np.ndarray) -> bool:
            return unit.name != "model.layers.2" and super().equals(unit, start, weights)

    source = open_source(make_layers(tmp_path / "m", layers=6, mebibytes=8))
    with pytest.raises(FormatError, match=r"layers\.2\..*do not decode to the original bits"):
        compress(source, tmp_path / "t", workers=3, coder=Broken())
    left = {path.name for path in (tmp_path / "t").iterdir()}
    assert COMPRESSION.journal in left
    assert not any(name.startswith(TEMPORARY) for name in left)
    assert "model_layers_2.safetensors" not in left
    compress(source, tmp_path / "t")
    assert compare(tmp_path / "t", tmp_path / "m").is_equal


def test_a_weight_that_must_stay_is_counted_once_in_the_progress(tmp_path: Path) -> None:
    model = make_layers(tmp_path / "m", layers=1, mebibytes=2)
    tensor = read_header(model / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    with (model / "model.safetensors").open("rb+") as stream:
        stream.seek(tensor.begin)
        stream.write(b"\xff\xff")  # a NaN
    seen: list[int] = []
    report = compress(open_source(model), tmp_path / "t", advance=seen.append)
    assert list(report.left) == [tensor.name]
    assert sum(seen) == 2 * MIB


def test_an_interruption_ends_at_once_with_130_and_the_rerun_goes_on(tmp_path: Path) -> None:
    model = make_layers(tmp_path / "m", layers=2, mebibytes=64)
    target = tmp_path / "t"
    command = [sys.executable, "-m", "vllm_dfloat.cli", "compress", str(model), str(target)]
    command += ["--workers", "2"]
    environment = {**os.environ, "VLLM_DFLOAT_THREADS": "1"}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        while not list(target.glob(f"{TEMPORARY}*")):
            assert process.poll() is None
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes
        err = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert err == "vllm-dfloat: interrupted.\n"
    left = {file.name for file in target.iterdir()}
    assert COMPRESSION.journal in left
    assert all(
        re.fullmatch(r"model_layers_\d\.safetensors", n) for n in left - {COMPRESSION.journal}
    )
    assert subprocess.run([*command, "--quiet"], env=environment).returncode == 0
    assert compare(target, model).is_equal


@pytest.mark.parametrize(
    ("cores", "jobs", "gigabytes", "memory", "expected"),
    [
        (8, 100, 800, 64, 8),
        (8, 3, 800, 64, 3),  # no more than there is to do
        (8, 100, 2, 64, 2),  # a process is not worth its start
        (8, 100, 800, 3, 2),  # layers of 51 GB, which take 1.4 GB each
        (8, 100, 800, 0, 1),
    ],
)
def test_as_many_processes_are_started_as_cores_work_and_memory_allow(
    cores: int, jobs: int, gigabytes: int, memory: int, expected: int
) -> None:
    job_bytes = WORKER_BYTES + 51 * 10**9 // 50
    found = share_cores(cores, jobs, job_bytes, gigabytes << 30, memory << 30)
    assert found == expected


def test_pieces_of_a_stored_tensor_are_its_bits(tmp_path: Path) -> None:
    bits = gaussian(100, 7)
    write_safetensors(tmp_path / "f", [Item("a", "BF16", bits.shape, lambda: [bits])])
    tensor = read_header(tmp_path / "f")["a"]
    parts = [piece.copy() for piece in read_pieces(tensor, 38)]
    assert {part.size for part in parts[:-1]} == {19}
    assert np.array_equal(np.concatenate(parts), bits.reshape(-1))
    part = np.concatenate([piece.copy() for piece in read_pieces(tensor, 38, 20, 100)])
    assert np.array_equal(part, bits.reshape(-1)[10:50])


def test_the_benchmark_runs_the_command_and_removes_what_it_made(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "scripts/bench_compress.py"
    command = [sys.executable, str(script), "--gigabytes", "0.004", "--units", "2"]
    command += ["--folder", str(tmp_path), "--json", str(tmp_path / "r.json")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    assert 0.67 < result["ratio"] < 0.69
    assert result["compress"]["cpu_s"] > 0
    assert result["decompress"]["cpu_s"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
