"""The instructions of PTX that move bytes: loads and stores, copies to shared memory, matrices, between threads."""

from functools import partial

import numpy as np
from ptx_program import Instruction
from ptx_state import U64, State


def move(state: State, one: Instruction) -> None:
    """ld, st."""
    kinds, size = one.kinds, int(one.kinds[-1][1:]) // 8
    if kinds[0] == "param":
        name = str(one.operands[1]).strip("[] ")
        value = state.parameters[int(name.rpartition("_")[2])]
        state.write(one.operands[0], np.full(state.program.threads, value, U64), size * 8)
        return
    memory = state.memory if kinds[0] == "global" else state.shared
    operands = one.operands[:2]  # a third is a hint for caches
    target, place = operands if one.base == "ld" else reversed(operands)
    address = state.address(place)
    registers = target if isinstance(target, list) else [target]
    bytes_each = size * len(registers)
    assert not (address[state.active] % bytes_each).any(), "an address that no GPU reads or writes"
    if memory is state.shared:
        threads = min(32, 128 // bytes_each)
        state.meet(*(each.reshape(-1, threads) for each in (address, state.active)), bytes_each)
    for i, register in enumerate(registers):
        if one.base == "ld":
            state.write(register, state.load(memory, address + i * size, size), size * 8)
        else:
            state.store(memory, address + i * size, state.read(register), size)


def copy(state: State, one: Instruction) -> None:
    """cp.async; all threads of a block commit and wait together."""
    assert one.kinds[0] == "async", one
    if one.kinds[1] == "commit_group":
        state.copies.commit()
    elif one.kinds[1] == "wait_group":
        state.copies.wait(int(str(one.operands[0])))
    else:
        size = int(str(one.operands[2]), 0)
        given = state.read(one.operands[3] if len(one.operands) > 3 else one.operands[2])
        places = state.address(one.operands[0]), state.address(one.operands[1])
        state.copies.add(partial(_copy, state, state.active, *places, size, given))


def _copy(
    state: State, active: np.ndarray, target: np.ndarray, source: np.ndarray, size: int, given: np.ndarray
) -> None:  # fmt: skip
    """Copy the first `given` of `size` bytes from global to shared memory, and zeros for the others."""
    kept = state.active
    for i in range(size):
        state.active = active & (i < given)
        value = state.load(state.memory, source + i, 1)
        state.active = active
        state.store(state.shared, target + i, np.where(i < given, value, U64(0)), 1)
    state.active = kept


def move_matrices(state: State, one: Instruction) -> None:
    """ldmatrix, stmatrix: 8 x 8 matrices of 16 bits; a thread gives the address of a row.

    A thread has two neighbours of a row, or with `trans` of a column, the first in its lower half.
    """
    held, place = one.operands if one.base == "ldmatrix" else reversed(one.operands)
    rows = state.address(place).reshape(-1, 32)
    of_eight, pair = state.tid % 32 // 4, state.tid % 4 * 2
    active = state.active.reshape(-1, 32)
    state.meet(*(each[:, : 8 * len(held)].reshape(-1, 8) for each in (rows, active)), 16)
    for i, register in enumerate(held):
        for half in (0, 1):
            row, column = (
                (pair + half, of_eight) if "trans" in one.kinds else (of_eight, pair + half)
            )
            address = rows[state.tid // 32, i * 8 + row] + 2 * column
            if one.base == "ldmatrix":
                found = state.load(state.shared, address, 2) << U64(16 * half)
                state.write(register, found if half == 0 else state.read(register) | found, 32)
            else:
                state.store(state.shared, address, state.read(register) >> U64(16 * half), 2)


def exchange(state: State, one: Instruction) -> None:
    """shfl: a register of another thread of the warp."""
    active = state.active.reshape(-1, 32)
    assert (active.all(1) | ~active.any(1)).all(), "an exchange without all threads of a warp"
    lane = state.read(one.operands[2]).astype(np.int64)
    if one.kinds[1] == "bfly":
        lane ^= state.tid % 32
    elif one.kinds[1] == "up":  # the first threads keep theirs
        assert one.operands[3] == "0", one
        lane = np.where(state.tid % 32 < lane, 0, -lane) + state.tid % 32
    else:
        assert one.kinds[1] == "idx", one
    lane = np.where(state.active, lane, 0)  # other warps may be elsewhere
    found = state.read(one.operands[1])[state.tid // 32 * 32 + lane]
    state.write(one.operands[0], found, 32)


def vote(state: State, one: Instruction) -> None:
    """Give each thread of a warp a bit for each of its threads where the predicate holds."""
    active = state.active.reshape(-1, 32)
    assert (active.all(1) | ~active.any(1)).all(), "a vote without all threads of a warp"
    holds = (state.read(one.operands[1]) != 0).reshape(-1, 32).astype(U64)
    bits = (holds << np.arange(32, dtype=U64)).sum(1)
    state.write(one.operands[0], np.repeat(bits, 32), 32)


def reduce(state: State, one: Instruction) -> None:
    """Give each thread of a warp the largest of its threads' values, or their sum."""
    _, operation, kind = one.kinds
    dtype = {"s32": np.int32, "u32": np.uint32}[kind]
    active = state.active.reshape(-1, 32)
    assert (active.all(1) | ~active.any(1)).all(), "a reduction without all threads of a warp"
    values = state.read(one.operands[1]).astype(np.uint32).view(dtype).reshape(-1, 32)
    combine = {"max": np.maximum, "add": np.add}[operation]
    found = combine.reduce(values, axis=1, dtype=dtype)
    state.write(one.operands[0], np.repeat(found, 32), 32)


def change(state: State, one: Instruction) -> None:
    """atom, red: add to a word in memory, or set bits of it, and get what was there before."""
    combine = {"add": np.add, "or": np.bitwise_or}
    (kind,) = set(one.kinds) & set(combine)
    target, place, value = one.operands if one.base == "atom" else ["_", *one.operands]
    memory = state.shared if "shared" in one.kinds else state.memory
    size = int(one.kinds[-1][1:]) // 8
    given = state.address(place), state.read(value)
    state.write(target, state.change(memory, *given, size, combine[kind]), size * 8)


def hint(state: State, one: Instruction) -> None:
    """createpolicy: what a cache should keep."""


INSTRUCTIONS = {
    "createpolicy": hint,
    "ld": move,
    "st": move,
    "cp": copy,
    "ldmatrix": move_matrices,
    "stmatrix": move_matrices,
    "shfl": exchange,
    "vote": vote,
    "redux": reduce,
    "atom": change,
    "red": change,
}
