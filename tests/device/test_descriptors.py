"""No reader follows a descriptor or a table that was changed in memory: the result is NaN or an error, never a crash.

The tests run in a separate process, which a wrong address would end; an inaccessible page follows the payload.
"""

import pytest
from guard_pages import run_python

_SETUP = """
import dataclasses, os, re, sys
import numpy as np, torch
from guard_pages import guarded
from helpers import gaussian, same_bits, to_torch
from vllm_dfloat.codec import descriptor
from vllm_dfloat.device import fused, groups, ops, unit_resident as units
from vllm_dfloat.codec import layout
from vllm_dfloat.errors import FormatError

NAME, ROWS, COLS = "model.layers.3.mlp.down_proj", 3, 2048
TILES, NUMEL = 3, ROWS * COLS
IDS = torch.tensor([2, 0])
WEIGHT = to_torch(gaussian(ROWS, COLS))
RAW = to_torch(np.random.default_rng(1).integers(0, 1 << 16, (ROWS, COLS)).astype(np.uint16) & 0xBFFF)

def behind_a_guard(packed):
    payload = guarded(packed.payload.numpy())
    desc = torch.zeros(4, dtype=torch.int64)
    return dataclasses.replace(packed, payload=payload, desc=desc).described_in(desc)

class Reader:
    '''A way to read a weight: run(desc) writes out and status, as a forward pass does, without looking at either.'''

    def __init__(self, pack, run, numel=NUMEL, statuses=TILES):
        self.pack, self.run = pack, run
        self.out = torch.zeros(numel, dtype=torch.bfloat16)
        self.status = torch.zeros(statuses, dtype=torch.int32)

def decode(reader, desc):
    ops.launch_decode(desc, ROWS, COLS, reader.out, reader.status)

def decode_unit(reader, desc):
    units.launch_decode(desc, ROWS, COLS, reader.out, reader.status)

def rows(reader, desc):
    if ops.uses_triton(desc.device):
        from vllm_dfloat.kernels.packed_rows import decode_rows
        decode_rows(desc, IDS, ROWS, COLS, reader.out.view(2, COLS), reader.status.view(2, -1))
    else:
        reader.out[:] = ops.decode_rows(desc, IDS, ROWS, COLS).view(-1)

def unit_rows(reader, desc):
    if ops.uses_triton(desc.device):
        from vllm_dfloat.kernels.dfloat11_resident import decode_resident_rows
        decode_resident_rows(desc, IDS, ROWS, COLS, reader.out.view(2, COLS))
    else:
        reader.out[:] = units.decode_rows(desc, IDS, ROWS, COLS).view(-1)

def multiply(num_x):
    def run(reader, desc):
        x = torch.ones(num_x, COLS, dtype=torch.bfloat16)
        scratch = torch.empty(NUMEL, dtype=torch.bfloat16), reader.status
        reader.out[:] = fused.launch_matmul(x, desc, ROWS, COLS, None, scratch).view(-1)
    return run

BEFORE = ops.pack(RAW, "before")

def block(reader, desc):
    shapes = [(ROWS, COLS)] * 2  # the second one is looked at
    table = groups.group_table([BEFORE.desc, desc], shapes)
    memory = torch.empty(2 * NUMEL, dtype=torch.bfloat16)
    memory[NUMEL:] = reader.out
    status = torch.empty(2 * TILES, dtype=torch.int32)
    status[TILES:] = reader.status
    groups.launch_decode_group(table, 2 * TILES, memory, status)
    reader.out[:], reader.status[:] = memory[NUMEL:], status[TILES:]
    assert same_bits(memory[:NUMEL].view(ROWS, COLS), RAW)

READERS = {
    "decode": lambda: Reader(ops.pack, decode),
    "rows": lambda: Reader(ops.pack, rows, 2 * COLS, 4),
    "block": lambda: Reader(ops.pack, block),
    "gemv": lambda: Reader(ops.pack, multiply(1), ROWS),
    "official": lambda: Reader(units.pack, decode_unit),
    "official rows": lambda: Reader(units.pack, unit_rows, 2 * COLS, 0),
}

def expect_refused(reader, held, what):
    '''The buffers hold the right answer from before; it must not be there any more, or an error says why.'''
    backend = os.environ["VLLM_DFLOAT_BACKEND"]
    reader.out[:], reader.status[:] = reader.answer, 0
    try:
        reader.run(reader, held.desc)
    except FormatError as error:
        assert backend == "numba", (what, error)
        assert str(error).startswith(f"{NAME}: descriptor ["), (what, error)
        assert "expected [" in str(error) and "load the model again" in str(error), error
    else:
        assert backend == "triton", f"{what}: no error"
        assert torch.isnan(reader.out).all(), f"{what}: an answer"
        touched = reader.status.view(2, -1)[:, :1] if reader.run is rows else reader.status
        assert (touched == 4).all(), f"{what}: status {reader.status}"

def expect_sound(reader, held):
    reader.out[:], reader.status[:] = float("nan"), -1
    reader.run(reader, held.desc)
    assert not torch.isnan(reader.out).any()
    reader.answer = reader.out.clone()
"""

_FLIPS = """
for backend, step, name in [a.split("/") for a in sys.argv[1:]]:
    os.environ["VLLM_DFLOAT_BACKEND"] = backend
    for weight in (WEIGHT, RAW):
        reader = READERS[name]()
        held = behind_a_guard(reader.pack(weight, NAME))
        assert held.is_raw == (weight is RAW)
        expect_sound(reader, held)
        answer = reader.answer
        step = int(step) if weight is WEIGHT else 21
        for word in range(4):
            for bit in range(word % step, 64, step):
                one = torch.tensor(1) << bit
                held.desc[word] ^= one
                expect_refused(reader, held, f"{backend} {name}: word {word}, bit {bit}")
                held.desc[word] ^= one
        rng, words = np.random.default_rng(0), held.desc.clone()
        others = [torch.from_numpy(rng.integers(-2**63, 2**63, 4)) for _ in range(8)]
        others += [torch.zeros(4).long(), torch.full([4], -1), words.flip(0), words * 3, words + 1, -words]
        others += [BEFORE.desc]  # whole and valid, but that of another layer of the same shape
        for other in others:
            held.desc.copy_(other)
            expect_refused(reader, held, f"{backend} {name}: {other}")
        held.desc.copy_(words)
        expect_sound(reader, held)
        assert same_bits(reader.answer, answer)
    print(backend, sys.argv[1].split('/')[1], name, flush=True)
"""

ON_CPU = ("decode", "rows", "block", "official", "official rows")
IN_KERNELS = ("decode", "rows", "block", "gemv", "official", "official rows")


def run(code: str, arguments: list[str]) -> None:
    preset = f"import sys; sys.argv = ['', *{arguments!r}]\n"
    done = run_python(preset + code, {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, (
        f"exit {done.returncode}: {done.stdout[-500:]}{done.stderr[-3000:]}"
    )
    assert done.stdout.split("\n")[:-1] == [a.replace("/", " ") for a in arguments]


@pytest.mark.parametrize(
    ("backend", "step", "readers"),
    [
        ("numba", 1, ON_CPU),
        ("triton", 31, IN_KERNELS[:2]),
        pytest.param("triton", 21, IN_KERNELS[2:], marks=pytest.mark.on_demand),
        pytest.param("triton", 1, IN_KERNELS[:3], marks=pytest.mark.on_demand),
        pytest.param("triton", 1, IN_KERNELS[3:], marks=pytest.mark.on_demand),
    ],
)
def test_a_descriptor_with_a_flipped_bit_or_overwritten_is_not_followed(
    backend: str, step: int, readers: tuple[str, ...]
) -> None:
    # Bug caught: a forward pass follows a wrong address, and the process crashes.
    run(_SETUP + _FLIPS, [f"{backend}/{step}/{name}" for name in readers])


_TABLES = """
ROWS, TILES, NUMEL = 1, 1, COLS
WEIGHT, RAW = WEIGHT[:1].contiguous(), RAW[:1].contiguous()
NAMES = "layers.0.qkv, layers.0.o, layers.0.up"
packed = [ops.pack(weight, name) for weight, name in zip((WEIGHT, RAW, WEIGHT), NAMES.split(", "))]
shapes = [(ROWS, COLS)] * 3
table = groups.group_table([p.desc for p in packed], shapes)
assert table.tolist() == groups.table_rows(table, [p.desc for p in packed], shapes)
for backend in sys.argv[1:]:
    os.environ["VLLM_DFLOAT_BACKEND"] = backend
    margin = 8 * NUMEL
    memory = torch.full((2 * margin + 3 * NUMEL,), 0.5, dtype=torch.bfloat16)
    out, status = memory[margin : margin + 3 * NUMEL], torch.empty(3 * TILES, dtype=torch.int32)
    groups.launch_decode_group(table, 3 * TILES, out, status)
    answer = out.clone()
    assert not status.any() and not torch.isnan(answer).any()
    words, rng = table.clone(), np.random.default_rng(0)
    step = 1 if backend == "numba" else 21  # the interpreter takes its time
    changed = [(bit, word) for word in range(16) for bit in range(word % step, 64, step)]
    for bit, word in changed:
        what = f"bit {bit} of word {word}"
        table.view(-1)[word] ^= torch.tensor(1) << bit
        out[:], status[:] = answer, 0
        try:
            groups.launch_decode_group(table, 3 * TILES, out, status)
        except FormatError as error:
            assert backend == "numba"
            # A changed row may be what names its matrix.
            named, _, rest = str(error).partition(": row ")
            assert named.startswith("group of layers.0.") and " of its table is [" in rest, error
        else:
            assert backend == "triton", what
            assert torch.isnan(out).all() and (status == 4).all(), what
        table.copy_(words)
    table[[0, 1]] = table[[1, 0]]  # two rows that changed places
    try:
        groups.launch_decode_group(table, 3 * TILES, out, status)
        assert backend == "triton" and torch.isnan(out).all()
    except FormatError:
        assert backend == "numba"
    table.copy_(words)
    groups.launch_decode_group(table, 3 * TILES, out, status)
    assert same_bits(out, answer) and not status.any()
    assert (memory[:margin] == 0.5).all() and (memory[-margin:] == 0.5).all()
    print(backend, flush=True)
"""


@pytest.mark.parametrize("backend", ["numba", "triton"])
def test_a_table_of_a_group_with_a_flipped_bit_is_not_followed(backend: str) -> None:
    # Bug caught: the wrong address of a descriptor is followed, or a matrix is written outside the buffer.
    run(_SETUP + _TABLES, [backend])


_STALE = """
packed = ops.pack(WEIGHT, NAME)
out, status = torch.empty(NUMEL, dtype=torch.bfloat16), torch.empty(TILES, dtype=torch.int32)
old, desc = packed.desc.clone(), packed.desc
new = ops.pack(WEIGHT * 2, NAME).described_in(desc)
del packed
ops.launch_decode(desc, ROWS, COLS, out, status)
assert same_bits(out.view(ROWS, COLS), WEIGHT * 2)
desc.copy_(old)  # its payload is gone
try:
    ops.launch_decode(desc, ROWS, COLS, out, status)
except FormatError as error:
    assert str(error).startswith(NAME)
    print("stale")
"""


def test_a_descriptor_from_before_a_reload_is_not_followed_on_a_cpu() -> None:
    # Bug caught: a descriptor of earlier weights is copied back; its seal is right, but its payload is gone.
    run(_SETUP + _STALE, ["stale"])


_WRONG_SHAPE = """
packed, unit = ops.pack(WEIGHT, NAME), units.pack(WEIGHT, NAME)
big = torch.empty(4 * NUMEL, dtype=torch.bfloat16), torch.empty(4 * TILES, dtype=torch.int32)
for held, launch in ((packed, ops.launch_decode), (unit, units.launch_decode)):
    for rows, cols in ((4, 2048), (3, 8192), (1, 2048)):
        for backend in ("numba", "triton"):
            os.environ["VLLM_DFLOAT_BACKEND"] = backend
            big[0].fill_(1)
            try:
                launch(held.desc, rows, cols, *big)
            except FormatError as error:
                assert backend == "numba" and NAME in str(error)
            else:
                assert backend == "triton" and torch.isnan(big[0][: rows * cols]).all()
print("shapes")
"""


def test_a_descriptor_is_not_followed_with_another_number_of_tiles_or_in_another_layout() -> None:
    # Bug caught: with the shape of another layer, reads leave the payload.
    run(_SETUP + _WRONG_SHAPE, ["shapes"])
