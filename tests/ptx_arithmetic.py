"""The instructions of PTX that compute in registers: moves, integers, comparisons, conversions, bytes.

An instruction or a form of one that no kernel of the tests uses is an error.
"""

import re
from collections.abc import Callable

import numpy as np
import ptx_floats
from ptx_floats import f32
from ptx_program import Instruction
from ptx_state import U64, State


def _signed(x: np.ndarray, bits: int) -> np.ndarray:
    return x.astype(f"u{bits // 8}").view(f"i{bits // 8}").astype(np.int64)


_BINARY: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "min": np.minimum, "max": np.maximum,
    "div": lambda a, b: np.where(b == 0, 0, np.abs(a) // np.maximum(np.abs(b), 1) * np.sign(a) * np.sign(b)),
    "rem": lambda a, b: a - np.where(b == 0, 0, np.abs(a) // np.maximum(np.abs(b), 1) * np.sign(a) * np.sign(b)) * b,
}  # fmt: skip
_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


def compute(state: State, one: Instruction) -> None:
    """Run an instruction whose first operand is the result and whose others are read."""
    bits = _bits(one)
    values = [state.read(operand) for operand in one.operands[1:]]
    if one.base in _OF_WORDS:
        state.write(one.operands[0], _OF_WORDS[one.base](*values), 32)
    elif one.base == "selp":
        state.write(one.operands[0], np.where(values[2] != 0, values[0], values[1]), bits)
    elif one.base == "shf":
        is_less = (values[2] < 32)[state.active]
        assert one.kinds[1] == "wrap" or is_less.all(), "a shift that is clamped"
        state.write(one.operands[0], _funnel(one.kinds[0], *values), 32)
    elif one.base == "bfe":
        state.write(one.operands[0], _extracted(one.kinds[-1][0] == "s", *values), bits)
    elif one.base == "neg":
        assert one.kinds[-1][0] == "s", one
        state.write(one.operands[0], -_signed(values[0], bits), bits)
    elif one.base == "not":
        state.write(one.operands[0], values[0] ^ U64((1 << bits) - 1), bits)
    elif one.base == "bfind":
        assert one.kinds[0] == "shiftamt", one
        found = np.where(state.active, values[0], U64(1))  # other warps may be elsewhere
        assert found.all()
        state.write(one.operands[0], 31 - np.log2(found).astype(np.int64), 32)
    elif ptx_floats.is_float(one):
        ptx_floats.compute(state, one, values)
    elif one.kinds[-1].endswith("x2"):
        _pairs(state, one, values)
    else:
        _integers(state, one, values, bits)


def _pairs(state: State, one: Instruction, values: list[np.ndarray]) -> None:
    """Add two numbers of 16 bits in each word."""
    assert one.base == "add", one
    a, b = values
    low, high = ((a >> U64(16 * i)) + (b >> U64(16 * i)) & U64(0xFFFF) for i in range(2))
    state.write(one.operands[0], low | high << U64(16), 32)


def move(state: State, one: Instruction) -> None:
    """mov: a register, two halves into one, or one into two halves."""
    target, source = one.operands
    bits = _bits(one)
    if isinstance(source, list):
        low, high = map(state.read, source)
        state.write(target, low | high << U64(bits // 2), bits)
    elif isinstance(target, list):
        value = state.read(source)
        for i, register in enumerate(target):
            state.write(register, value >> U64(i * bits // 2), bits // 2)
    else:
        state.write(target, state.read(source), bits)


def _bits(one: Instruction) -> int:
    kind = one.kinds[-1]
    return 1 if kind == "pred" else int(re.sub(r"\D", "", kind.removesuffix("x2")) or 32)


def _integers(state: State, one: Instruction, values: list[np.ndarray], bits: int) -> None:
    base, kinds, target = one.base, one.kinds, one.operands[0]
    is_signed = kinds[-1][0] == "s"
    if base in ("shl", "shr"):
        state.write(target, _shifted(base, is_signed, bits, *values), bits)
        return
    if bits == 64 and not is_signed:
        assert base not in ("div", "rem"), one  # of int64 they are others
        assert "hi" not in kinds, one
        if base in ("min", "max"):
            state.write(target, _BINARY[base](*values), bits)
            return
        whole = [value.view(np.int64) for value in values]
    elif bits == 1:
        whole = [value.astype(np.int64) for value in values]
    else:
        whole = [
            _signed(value, bits) if is_signed else (value & U64((1 << bits) - 1)).astype(np.int64)
            for value in values
        ]
    if base in ("mul", "mad"):
        result = whole[0] * whole[1]
        if "hi" in kinds:
            result >>= bits
        if base == "mad":
            is_wide = "wide" in kinds
            result = result + (values[2].view(np.int64) if is_wide else whole[2])
        state.write(target, result, 2 * bits if "wide" in kinds else bits)
    else:
        state.write(target, _BINARY[base](whole[0], whole[1]), bits)


def _shifted(
    base: str, is_signed: bool, bits: int, value: np.ndarray, amount: np.ndarray
) -> np.ndarray:
    by = np.minimum(amount & U64(0xFFFF_FFFF), U64(63))
    if base == "shr" and is_signed:
        return _signed(value, bits) >> by.astype(np.int64)
    found = value << by if base == "shl" else value >> by
    return np.where(amount & U64(0xFFFF_FFFF) < bits, found, U64(0))


def compare(state: State, one: Instruction) -> None:
    """setp, also with a further predicate that must be true."""
    kinds, bits = one.kinds, _bits(one)
    values = [state.read(operand) for operand in one.operands[1:]]
    if kinds[0] == "num":
        state.write(one.operands[0], ~np.isnan(f32(values[0])) & ~np.isnan(f32(values[1])), 1)
        return
    if ptx_floats.is_float(one):
        a, b = map(f32, values[:2])
    elif kinds[-1][0] == "s":
        a, b = (_signed(value, bits) for value in values[:2])
    else:
        a, b = ((value & U64((1 << bits) - 1)) if bits < 64 else value for value in values[:2])
    result = _COMPARE[kinds[0]](a, b)
    if ptx_floats.is_float(one):
        result &= ~np.isnan(a) & ~np.isnan(b)
    if len(kinds) == 3:
        assert kinds[1] == "and", one
        result = result & (values[2] != 0)
    state.write(one.operands[0], result, 1)


def convert(state: State, one: Instruction) -> None:
    """cvt, of integers to other sizes; see ptx_floats.py for others."""
    values = [state.read(operand) for operand in one.operands[1:]]
    if ptx_floats.is_conversion(one):
        ptx_floats.convert(state, one, values)
        return
    to, source = (int(kind[1:]) for kind in one.kinds)
    value = _signed(values[0], source) if one.kinds[1][0] == "s" else values[0]
    state.write(one.operands[0], value, to)


def _extracted(
    is_signed: bool, word: np.ndarray, first: np.ndarray, number: np.ndarray
) -> np.ndarray:
    length = int(number[0])
    assert (number == number[0]).all()
    value = word >> first & U64((1 << length) - 1)
    if is_signed:
        return (value.astype(np.int64) << (64 - length)) >> (64 - length)
    return value


def _permuted(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    both = (a & U64(0xFFFF_FFFF)) | b << U64(32)
    result = np.zeros_like(a)
    for i in range(4):
        chosen = selector >> U64(4 * i)
        assert not (chosen & U64(8)).any()
        byte = both >> ((chosen & U64(7)) * U64(8)) & U64(0xFF)
        result |= byte << U64(8 * i)
    return result


def _funnel(direction: str, low: np.ndarray, high: np.ndarray, amount: np.ndarray) -> np.ndarray:
    amount = amount & U64(31)
    both = (low & U64(0xFFFF_FFFF)) | high << U64(32)
    return both << amount >> U64(32) if direction == "l" else both >> amount


def _bit(word: np.ndarray) -> np.ndarray:
    """Return the bits of a word, the lowest first."""
    return (word[:, None] >> np.arange(32, dtype=U64)) & U64(1)


_OF_WORDS: dict[str, Callable[..., np.ndarray]] = {
    "prmt": _permuted,
    "brev": lambda word: (_bit(word) << np.arange(31, -1, -1, dtype=U64)).sum(1),
    "popc": lambda word: _bit(word).sum(1),
}
INSTRUCTIONS = dict.fromkeys(
    [*_BINARY, *_OF_WORDS, "mul", "mad", "fma", "shl", "shr", "selp", "shf", "bfe", "neg", "not", "bfind"],
    compute,
) | {
    "mov": move,
    "setp": compare,
    "cvt": convert,
}  # fmt: skip
