"""No reader of the fast layout touches a byte outside its arrays, for any bytes of the payload.

The test runs in a separate process, with an inaccessible page behind every array: an access there ends the process.
"""

import mmap

import pytest
import torch
from guard_pages import run_python

from vllm_dfloat.codec.fast_layout import FastLayout, size
from vllm_dfloat.device import fast_ops
from vllm_dfloat.device.packed_weight import make_descriptor

_GUARDED = """
import numpy as np, torch
from guard_pages import guarded
from helpers import gaussian
from vllm_dfloat.codec import fast_decode as numba
from vllm_dfloat.codec.fast_encode import encode
from vllm_dfloat.codec.fast_layout import FastTensor, size
from vllm_dfloat.device.packed_weight import make_descriptor
from vllm_dfloat.errors import FormatError
from vllm_dfloat.kernels import fast_decode, fast_rows

ROWS, COLS = 200, 650  # 4 x 6 tiles, partial in both directions
weight = gaussian(ROWS, COLS)
weight[64:128, 640:] = 0x8000  # a raw tile
fast = encode(weight)
lay = fast.layout
IDS = np.array([ROWS - 1, 0, 70])

def kernel(payload):
    memory = guarded(payload)
    desc = make_descriptor(memory, (2, lay.num_entries, lay.base), size(ROWS, COLS))
    out = guarded(np.full(ROWS * COLS, 0x7FC1, np.uint16)).view(torch.bfloat16)
    status = guarded(np.full(lay.num_tiles, -1, np.int32))
    fast_decode.decode(desc, ROWS, COLS, out, status)
    rows = guarded(np.full((3, COLS), 0x7FC1, np.uint16)).view(torch.bfloat16)
    fast_rows.decode_rows(desc, guarded(IDS), ROWS, COLS, rows)
    assert (status >= 0).all(), "a status word was not written"
    bits = out.view(torch.uint16).numpy().reshape(ROWS, COLS)
    return bits, rows.view(torch.uint16).numpy(), status.numpy()

def cpu(payload):
    held = FastTensor(lay, guarded(payload).numpy())
    out = guarded(np.full((ROWS, COLS), 0x7FC1, np.uint16)).numpy()
    status = guarded(np.full(lay.num_tiles, -1, np.int32)).numpy()
    numba.decode_into(held, out, status)
    try:
        rows = numba.decode_rows(held, IDS)
    except FormatError:
        rows = None
    return out, rows, status

run = {"kernel": kernel, "cpu": cpu}[READER]
bits, rows, status = run(fast.payload)
assert (bits == weight).all() and (rows == weight[IDS]).all() and not status.any()
SECTIONS = {
    "low": (0, lay.high_offset),
    "high": (lay.high_offset, lay.starts_offset),
    "starts": (lay.starts_offset, lay.entries_offset),
    "entries": (lay.entries_offset, lay.num_bytes),
}
rng = np.random.default_rng(0)
for name, (first, last) in SECTIONS.items():
    for kind in range(3):  # a few bits; random bytes; all ones
        payload = fast.payload.copy()
        part = payload[first:last]
        if kind == 0:
            for at in rng.integers(0, min(part.size, 48), 8):
                part[at] ^= 1 << rng.integers(0, 8)
        else:
            part[:] = rng.integers(0, 256, part.size) if kind == 1 else 255
        _, _, status = run(payload)
        # Only the starts can contradict each other: any other bytes are weights.
        assert status.any() == (name == "starts"), (name, kind, status)
print("done")
"""


@pytest.mark.parametrize("reader", ["kernel", "cpu"])
def test_no_access_leaves_the_arrays_whatever_the_bytes_say(reader: str) -> None:
    done = run_python(f"READER = {reader!r}\n{_GUARDED}", {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr}"
    assert done.stdout == "done\n"


@pytest.mark.parametrize("backend", ["triton", "numba"])
def test_row_behind_the_first_2_to_the_31_weights_is_found(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Bug caught: row * cols in 32 bits: the kernel reads before the payload, where this test has zeros.
    monkeypatch.setenv("VLLM_DFLOAT_BACKEND", backend)
    rows, cols = 2**21 + 2, 1024
    lay = FastLayout(rows, cols, 0, 0)
    offset = 1 << 32
    with mmap.mmap(-1, offset + lay.num_bytes) as memory:  # only pages that are touched take memory
        payload = torch.frombuffer(memory, dtype=torch.uint8)[offset:]
        payload[(rows - 1) * cols : rows * cols] = 7
        desc = make_descriptor(payload, (2, 0, 0), size(rows, cols))
        ids = torch.tensor([rows - 1], dtype=torch.int32)
        found = fast_ops.decode_rows(desc, ids, rows, cols)
        del payload  # otherwise the memory could not be unmapped
    assert (found.view(torch.int16) == 7).all()
