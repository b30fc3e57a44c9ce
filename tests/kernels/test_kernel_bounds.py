"""No kernel of the packed layout touches a byte outside its tensors, for any bytes of the payload.

The tests run in a separate process, with an inaccessible page before and after every tensor: in Triton's interpreter an
access outside a tensor then ends the process instead of reading other memory.
"""

import pytest
from guard_pages import run_python

_GUARDED = """
import os, sys
import numpy as np, torch
from guard_pages import guarded
from helpers import gaussian, to_torch
from vllm_dfloat.codec.descriptor import ROW_WORDS
from vllm_dfloat.device import groups, ops
from vllm_dfloat.codec import layout
from vllm_dfloat.codec.encode import encode
from vllm_dfloat.kernels import group_decode as decode_group, packed_decode as decode, packed_matmul as matmul
from vllm_dfloat.kernels import expert_decode, expert_marks, packed_rows as decode_rows

ROWS, COLS = 3, 1536  # 3 tiles, the last one partly filled; rows begin within tiles
weight = gaussian(ROWS, COLS)
packed = encode(weight)
lay = packed.layout
tiles = lay.num_tiles

def run(kernel, payload, at_end):
    memory = guarded(payload, at_end)
    desc = guarded(np.zeros(4, np.int64))
    held = ops.PackedWeight(memory, desc, ROWS, COLS, "w", (0, lay.num_words, lay.code_bits), 0)
    desc.copy_(torch.tensor(held.words))
    out = guarded(np.full(lay.padded_numel, 0x7FC1, np.uint16), at_end).view(torch.bfloat16)
    status = guarded(np.full(tiles, -1, np.int32), at_end)
    if kernel == "decode":
        decode.decode(desc, tiles, out, status)
    elif kernel == "decode_group":
        table = guarded(np.zeros((2, ROW_WORDS), np.int64))
        table.copy_(torch.tensor(groups.table_rows(table, [desc], [(ROWS, COLS)])))
        decode_group.decode_group(table, tiles, out, status)
    elif kernel == "decode_chosen":
        # An expert a row, so that experts share tiles. Flags of any value, and none before or after them.
        flags = guarded(np.array([-1, 2**31 - 1, 5], np.int32), at_end)
        status[:] = 0
        expert_decode.decode_chosen(desc, ROWS, COLS, flags, out, status, 2)
    elif kernel == "decode_rows":
        ids = guarded(np.array([2, ROWS - 1, -1, 1 << 62]))  # vLLM masks ids outside afterwards
        rows = guarded(np.full((4, COLS), 0x7FC1, np.uint16), at_end).view(torch.bfloat16)
        status = guarded(np.full((4, decode_rows.statuses_per_row(COLS)), -1, np.int32), at_end)
        decode_rows.decode_rows(desc, ids, ROWS, COLS, rows, status)
        out = rows[:2].reshape(-1)
    else:
        num_x = 3
        x = guarded(np.full((num_x, COLS), 0x3F80, np.uint16), at_end).view(torch.bfloat16)
        bias = guarded(np.full(ROWS, 0x3F80, np.uint16), at_end).view(torch.bfloat16)
        partials = guarded(np.full(matmul.num_partials(tiles, COLS, num_x), np.nan, np.float32), at_end)
        out = guarded(np.full((num_x, ROWS), 0x7FC1, np.uint16), at_end).view(torch.bfloat16)
        matmul.matmul(x, desc, bias, COLS, out, partials, status)
    assert (status >= 0).all(), "a status word was not written"
    return out.clone(), status.clone()

SECTIONS = {
    "lut": (0, lay.sign_mantissa_offset),
    "sign_mantissa": (lay.sign_mantissa_offset, lay.lane_lengths_offset),
    "lane_lengths": (lay.lane_lengths_offset, lay.tile_starts_offset),
    "tile_starts": (lay.tile_starts_offset, lay.words_offset),
    "words": (lay.words_offset, lay.num_bytes),
}
kernel = os.environ["KERNEL"]
if kernel == "mark_chosen":
    wild = np.array([0, 6, -1, 7, 8, 2**31 - 1, -(2**31), 3] * 300)
    for ids in (wild[:5].astype(np.int32), wild, wild * 2**31 + 3):
        for at_end in (True, False):
            for mapped in (None, np.array([2, 1, 0, -1, 3, 2**31 - 1, -(2**31)], np.int32)):
                flags = guarded(np.full(3 if mapped is not None else 7, 9, np.int32), at_end)
                to_local = None if mapped is None else guarded(mapped, at_end)
                expert_marks.mark_chosen(guarded(ids, at_end), to_local, flags)
                assert set(flags.tolist()) <= {0, 1}
    print("done")
    sys.exit()
for at_end in (True, False):
    sound, status = run(kernel, packed.payload, at_end)
    assert not status.any()
    assert not (sound.view(torch.uint16) == 0x7FC1).any()
rng = np.random.default_rng(0)
for name, (first, last) in SECTIONS.items():
    reported = 0
    for kind in range(3):  # a few bits; random bytes; all ones
        payload = packed.payload.copy()
        part = payload[first:last]
        if kind == 0:
            for at in rng.integers(0, part.size, 8):
                part[at] ^= 1 << rng.integers(0, 8)
        else:
            part[:] = rng.integers(0, 256, part.size) if kind == 1 else 255
        out, status = run(kernel, payload, bool(kind % 2))
        reported += bool(status.any())
    # Signs and mantissas stand for themselves: any bytes are weights.
    assert (reported == 0) if name == "sign_mantissa" else (reported >= 2), (name, reported)
print("done")
"""


# They share the code that reads a tile; the two that also take ids, activations and a bias always run.
@pytest.mark.parametrize(
    "kernel",
    [
        "decode_rows",
        "decode_chosen",
        "mark_chosen",
        "gemv",
        *(pytest.param(k, marks=pytest.mark.on_demand) for k in ("decode", "decode_group")),
    ],
)
def test_no_access_leaves_the_tensors_whatever_the_bytes_say(kernel: str) -> None:
    done = run_python(_GUARDED, {"TRITON_INTERPRET": "1", "KERNEL": kernel})
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr}"
    assert done.stdout == "done\n"
