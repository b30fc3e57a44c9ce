"""The instructions of PTX for tensor cores: mma of a warp, and wgmma of a warp group with operands in shared memory.

What is modelled of wgmma is what a proof of the order needs: which columns each step multiplies, and in which order the
steps are added. A is in registers or in shared memory, B in shared memory, columns of K lie next to each other in both,
swizzled over 128 or 64 bytes, as a descriptor says; anything else is an error.
"""

import re
from functools import partial

import numpy as np
from ptx_program import Instruction, Operand
from ptx_state import U64, State
from tensor_cores import from_bf16

_STEP = 16  # columns
_GROUP = 4  # warps
_LINES = {1: 128, 2: 64}  # bytes of a row that are swizzled, by a descriptor's kind


def multiply(state: State, one: Instruction) -> None:
    """mma.sync.aligned.m16n8k16: each warp for itself."""
    assert one.kinds[:4] == ["sync", "aligned", "m16n8k16", "row"], one
    assert state.active.all(), "a step of the tensor cores without all threads"
    d, a, b, c = one.operands
    right = np.zeros((_warps(state), _STEP, 8), np.float32)
    lane = np.arange(32)
    for i, register in enumerate(b):
        for half in range(2):
            right[:, 2 * (lane % 4) + half + 8 * i, lane // 4] = _halves(state, register)[..., half]
    _put_sums(state, d, state.multiply(_left(state, a), right, _sums(state, c)))


def multiply_in_groups(state: State, one: Instruction) -> None:
    """wgmma: fence, mma_async, commit_group, wait_group.

    A step is done when it is waited for if the state is `late`, or else at once: a kernel whose operands change
    meanwhile gets other bits.
    """
    if one.kinds[0] == "fence":
        return
    if one.kinds[0] == "commit_group":
        state.steps.commit()
    elif one.kinds[0] == "wait_group":
        state.steps.wait(int(str(one.operands[0])))
    else:
        assert one.kinds[0] == "mma_async", one
        assert state.active.all(), "a step of the tensor cores without all threads"
        _begin_step(state, one)


def _begin_step(state: State, one: Instruction) -> None:
    """Read what a step reads when it begins: where its operands are in shared memory, and whether the sums count."""
    shape = re.fullmatch(r"m64n(\d+)k16", one.kinds[3])
    assert shape is not None, one
    assert one.kinds[4:] == ["f32", "bf16", "bf16"], one
    d, a, b, scale, *signs_and_order = one.operands
    # The signs of A and B, and whether each lies transposed in shared memory, of which A in registers has none.
    assert signs_and_order == ["1", "1", "0", "0"][: 3 if isinstance(a, list) else 4], one
    right = _places_in_shared(state, str(b), int(shape[1]))
    left = a if isinstance(a, list) else _places_in_shared(state, a, _GROUP * 16)
    keeps = (state.read(scale) != 0).reshape(-1, 32)[:, :1, None]
    state.steps.add(partial(_step, state, d, left, right, keeps))


def _step(
    state: State, d: Operand, a: Operand | np.ndarray, right: np.ndarray, keeps: np.ndarray
) -> None:
    left = _from_shared(state, a) if isinstance(a, np.ndarray) else _left(state, a)
    before = np.where(keeps, _sums(state, d), np.float32(0))
    b = _from_shared(state, right).swapaxes(-1, -2).repeat(_GROUP, 0)
    result = state.multiply(left.reshape(-1, 16, _STEP), b, before)
    kept, state.active = state.active, np.ones_like(state.active)
    _put_sums(state, d, result)
    state.active = kept


def _places_in_shared(state: State, register: str, rows: int) -> np.ndarray:
    """Return where each number of an operand [groups, rows, 16] is, as descriptors in a register say."""
    found = []
    for desc in state.read(register).reshape(-1, 32 * _GROUP):
        value = int(desc[0])
        assert (desc == desc[0]).all(), "threads of a warp group have other descriptors"
        line = _LINES.get(value >> 62)
        assert line is not None, f"{value:x}: not swizzled over 128 or 64 bytes"
        assert value >> 49 & 7 == 0, f"{value:x}: with an offset of its base"
        start, stride = (value & 0x3FFF) << 4, (value >> 32 & 0x3FFF) << 4
        row, column = np.arange(rows)[:, None], np.arange(_STEP)[None]
        place = start + row // 8 * stride + row % 8 * line + 2 * column
        found.append(
            place ^ (place >> 7 & line // 16 - 1) << 4
        )  # the swizzle: of each 8 rows, by address
    return np.stack(found)


def _from_shared(state: State, places: np.ndarray) -> np.ndarray:
    low, high = (state.shared[places + i].astype(np.uint16) for i in range(2))
    return from_bf16(low | high << 8)


def _warps(state: State) -> int:
    return state.program.threads // 32


def _halves(state: State, register: str) -> np.ndarray:
    """Return the two BF16 numbers of a register, [warps, 32, 2]."""
    word = state.read(register).reshape(-1, 32).astype(np.uint32)
    return np.stack([from_bf16(word & 0xFFFF), from_bf16(word >> 16)], -1)


def _left(state: State, a: Operand) -> np.ndarray:
    """Return operand A of each warp, [warps, 16, 16], from four registers."""
    left, lane = np.zeros((_warps(state), 16, _STEP), np.float32), np.arange(32)
    for i, register in enumerate(a):
        for half in range(2):
            at = lane // 4 + 8 * (i % 2), 2 * (lane % 4) + half + 8 * (i // 2)
            left[:, at[0], at[1]] = _halves(state, register)[..., half]
    return left


def _places(i: int) -> tuple[np.ndarray, np.ndarray]:
    """Return row and column, of those of a warp, of the sums in register i of each lane."""
    lane = np.arange(32)
    return lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2


def _sums(state: State, registers: Operand) -> np.ndarray:
    """Return the FP32 sums of each warp, [warps, 16, columns]."""
    sums = np.zeros((_warps(state), 16, 2 * len(registers)), np.float32)
    for i, register in enumerate(registers):
        row, column = _places(i)
        bits = state.read(register).astype(np.uint32)
        sums[:, row, column] = bits.view(np.float32).reshape(-1, 32)
    return sums


def _put_sums(state: State, registers: Operand, sums: np.ndarray) -> None:
    for i, register in enumerate(registers):
        row, column = _places(i)
        value = np.ascontiguousarray(sums[:, row, column].astype(np.float32)).ravel()
        state.write(register, value.view(np.uint32).astype(U64), 32)


INSTRUCTIONS = {"mma": multiply, "wgmma": multiply_in_groups}
