"""What packing holds beside a matrix: its payload and a few bytes per tile, however large the matrix is."""

import json
import tracemalloc
from pathlib import Path

import pytest
from helpers import gaussian, to_torch
from torch.profiler import ProfilerActivity, profile

from vllm_dfloat.codec import encode
from vllm_dfloat.device import packed_encode

MORE = 0.03  # of the matrix, beside the payload: lane lengths of 16 bytes per tile, places of tiles, tables


def test_the_cpu_encoder_holds_the_payload_beside_the_matrix() -> None:
    bits = gaussian(4096, 1024)
    encode.encode(bits[:8])  # compiles
    tracemalloc.start()
    try:
        packed = encode.encode(bits)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert packed.payload.nbytes < peak < packed.payload.nbytes + MORE * bits.nbytes


def test_the_gpu_encoder_holds_the_payload_beside_the_matrix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Bug caught: a second copy of the matrix. Memory of tensors counts; the interpreter's own does not.
    weight = to_torch(gaussian(512, 256))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        _, payload = packed_encode.encode(weight, "w")
    seen.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    memory = [event["args"] for event in events if event["name"] == "[memory]"]
    first = memory[0]["Total Allocated"] - memory[0]["Bytes"]
    peak = max(each["Total Allocated"] for each in memory) - first
    assert payload.nbytes < peak < payload.nbytes + MORE * weight.nbytes + (1 << 14)
