"""Compile the fast product that loads ahead for a GPU, run it without one, and compare with exact sums.

    python tests/compiled_ahead.py

For a process of its own, since TRITON_INTERPRET makes functions that cannot be compiled. Every sum of these operands is
an FP32 number whatever the order, so each result has one right answer. Prints, as JSON, for each case how many of the
results differ, how often threads access shared memory and meet in its banks, and of some barriers which could be left
out unseen.
"""

import json
import os
import re
import sys
from contextlib import suppress
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "scripts")]

import numpy as np
import torch
from compile_specs import fast_matmul as specs
from ptx_banks import Banked
from ptx_program import Program

from vllm_dfloat.codec import descriptor, fast_layout
from vllm_dfloat.codec.descriptor import KIND_FAST
from vllm_dfloat.codec.fast_encode import encode
from vllm_dfloat.kernels.fast_planes import LOW_BYTES

ROWS, COLS = 90, 1024  # two turns of 4 warps
X, BIAS, OUT, DESC, PAYLOAD = (0x10000 * i for i in (1, 6, 7, 9, 10))  # addresses
POISON = 0x7FC1
BARRIER = re.compile(r"\bbar\.sync\s+0;")

Bits = np.ndarray


def weights() -> torch.Tensor:
    """Return [ROWS, COLS]: tiles with no, a few, more than 32 escapes, and one that is held raw."""
    rng = torch.Generator().manual_seed(3)

    def powers(first: int, last: int, *shape: int) -> torch.Tensor:
        return torch.exp2(torch.randint(first, last + 1, shape, generator=rng).float())

    def chosen(share: float, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=rng) < share

    sign = torch.sign(torch.randn(ROWS, COLS, generator=rng))
    weight = torch.randint(1, 4, (ROWS, COLS), generator=rng).float() * sign
    few = chosen(0.004, ROWS, COLS)
    few[:, COLS - 128 :] = False
    weight[few] *= powers(-8, 4, ROWS, COLS)[few]
    weight[:64, 128:256] = powers(-13, 4, 64, 128) * sign[:64, 128:256]
    many = chosen(0.05, ROWS - 64, 128)
    weight[64:, 256:384][many] *= 2**-12
    weight[70] *= ~chosen(0.2, COLS)
    return weight.bfloat16()


def products(
    name: str, target: str, num_x: int, removed: int = -1
) -> tuple[Bits, Bits, np.ndarray]:
    """Return a kernel's results, the right ones, and accesses and conflicts in shared memory per 2,048 weights.

    Args:
        removed: which of its barriers, in the order of the code, to leave out.
    """
    (spec,) = [spec for spec in specs.AHEAD + specs.BANDS if spec.name == name]
    rng = torch.Generator().manual_seed(num_x)
    weight = weights()
    x = torch.randint(-1, 2, (num_x, COLS), generator=rng).bfloat16()
    bias = torch.randint(-9, 10, (ROWS,), generator=rng).bfloat16()
    held = encode(weight.view(torch.uint16).numpy(), must_be_small=False)
    assert held is not None
    entries = np.diff(held.starts)
    assert entries.min() == 0
    assert entries.max() == fast_layout.RAW_ENTRIES
    assert ((entries > 32) & (entries <= fast_layout.MAX_ESCAPES)).any()

    salt = descriptor.salt(DESC, fast_layout.size(ROWS, COLS))
    words = descriptor.words(PAYLOAD, (KIND_FAST, held.layout.num_entries, held.layout.base), salt)
    desc = np.array([descriptor.signed(word) for word in words])
    memory = np.zeros(1 << 20, np.uint8)
    given = {
        X: x.view(torch.uint8),
        BIAS: bias.view(torch.uint8),
        DESC: desc,
        PAYLOAD: held.payload,
    }
    for place, values in given.items():
        raw = np.asarray(values).view(np.uint8).ravel()
        memory[place : place + len(raw)] = raw
    out = memory[OUT : OUT + 2 * num_x * ROWS].view(np.uint16)
    out[:] = POISON
    compiled = spec.compile(target)
    barriers = list(BARRIER.finditer(compiled.asm["ptx"]))
    ptx = compiled.asm["ptx"]
    if removed >= 0:
        ptx = ptx[: barriers[removed].start()] + ptx[barriers[removed].end() :]
    program = Program(ptx)
    at_once, bands = spec.constexprs["ROWS"], specs.bands(spec.constexprs["ROWS"], spec.num_warps)
    rows = spec.constexprs.get("BN", bands.rows)  # of a program
    blocks = -(-ROWS // rows) * -(-num_x // at_once)
    parameters = [DESC, X, BIAS, OUT, salt % (1 << 64), LOW_BYTES, ROWS, COLS, num_x, 0, 0]
    machines = [
        Banked(program, memory, parameters, (block, 0), (blocks, 1), compiled.metadata.shared)
        for block in range(blocks)
    ]
    for machine in machines:
        machine.run()
    counts = [(machine.accesses, machine.conflicts) for machine in machines]
    shared_memory = np.sum(counts, 0) / (blocks * rows * COLS) * 2048
    exact = x.double() @ weight.double().T + bias.double()
    assert (exact.float().double() == exact).all()
    return out.copy(), exact.float().bfloat16().view(torch.uint16).numpy().ravel(), shared_memory


def main() -> int:
    unequal, shared_memory = {}, {}
    for name, target, num_x in (
        ("fast_ahead_8", "sm_90", 5),
        ("fast_ahead_16", "sm_80", 16),
        ("fast_ahead_in_order_32_16x2", "sm_80", 32),
        ("fast_ahead_in_order_16_8x2", "sm_90", 7),
        ("fast_bands_16", "sm_89", 9),
        ("fast_bands_32", "sm_80", 32),
        ("fast_bands_64", "sm_90", 70),
    ):
        case = f"{name}, {target}, {num_x} rows"
        found, expected, counts = products(name, target, num_x)
        shared_memory[case] = counts.tolist()
        unequal[case] = int((found != expected).sum())
    missed = []
    for name, removed in (
        ("fast_ahead_in_order_16_8x2", 0),
        ("fast_bands_64", 0),
        ("fast_bands_64", 1),
    ):
        with suppress(AssertionError):
            products(name, "sm_90", 7 if "ahead" in name else 50, removed)
            missed.append(f"{name} without its barrier {removed}")
    json.dump({"unequal": unequal, "shared memory": shared_memory, "missed": missed}, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
