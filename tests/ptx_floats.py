"""FP32 and BF16 in PTX: sums and products, of single numbers or of two in a word, and conversions.

A form that no kernel of the tests uses is an error.
"""

import re

import numpy as np
from ptx_program import Instruction
from ptx_state import U64, State

_NAN = U64(0x7FFF)  # the BF16 that a GPU makes of any NaN


def f32(x: np.ndarray) -> np.ndarray:
    """Return the FP32 numbers that registers hold."""
    return x.astype(np.uint32).view(np.float32)


def is_float(one: Instruction) -> bool:
    """Return whether an instruction computes with FP32 or BF16."""
    return re.fullmatch(r"f32(x2)?|bf16(x2)?", one.kinds[-1]) is not None


def compute(state: State, one: Instruction, values: list[np.ndarray]) -> None:
    """add, mul, fma."""
    kinds = [kind for kind in one.kinds if kind != "rn"]
    if kinds == ["f32x2"]:
        shifted = [[value >> U64(32 * i) & U64(0xFFFF_FFFF) for value in values] for i in range(2)]
        low, high = (_result(one, *map(f32, each)).astype(U64) for each in shifted)
        state.write(one.operands[0], low | high << U64(32), 64)
    elif kinds == ["f32", "bf16"]:  # of which the last operand is FP32
        wide = [f32(value << U64(16)) for value in values[:-1]]
        state.write(one.operands[0], _result(one, *wide, f32(values[-1])), 32)
    else:
        assert kinds == ["f32"], one
        state.write(one.operands[0], _result(one, *map(f32, values)), 32)


def _result(one: Instruction, a: np.ndarray, b: np.ndarray, *c: np.ndarray) -> np.ndarray:
    assert one.base in ("add", "mul", "fma"), one
    if one.base == "fma":
        return _fused(a, b, c[0]).view(np.uint32)
    return (a + b if one.base == "add" else a * b).view(np.uint32)


@np.errstate(invalid="ignore")
def _fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Return a * b + c, rounded once: FP64 holds the product, and is rounded to odd where it does not hold the sum."""
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + addend
    other = total - product
    lost = (product - (total - other)) + (addend - other)
    is_even = (total.view(np.int64) & 1) == 0
    towards = np.where(lost > 0, np.inf, -np.inf)
    is_rounded = np.isfinite(lost) & (lost != 0) & is_even
    return np.where(is_rounded, np.nextafter(total, towards), total).astype(np.float32)


def is_conversion(one: Instruction) -> bool:
    """Return whether a cvt is from or to FP32 or BF16."""
    return any(kind[0] in "fb" and "f" in kind for kind in one.kinds)


def convert(state: State, one: Instruction, values: list[np.ndarray]) -> None:
    """cvt: FP32 into BF16, also two at a time, BF16 into FP32."""
    kinds = [kind for kind in one.kinds if kind != "rn"]
    if kinds == ["bf16x2", "f32"]:
        high, low = (to_bf16(f32(value)) for value in values)
        state.write(one.operands[0], low | high << U64(16), 32)
    elif kinds == ["bf16", "f32"]:
        state.write(one.operands[0], to_bf16(f32(values[0])), 16)
    else:
        assert kinds == ["f32", "bf16"], one
        state.write(one.operands[0], values[0] << U64(16), 32)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Return the bits of FP32 numbers, rounded to nearest with ties to even."""
    bits = x.astype(np.float32).view(np.uint32).astype(U64)
    rounded = (bits + U64(0x7FFF) + ((bits >> U64(16)) & U64(1))) >> U64(16)
    return np.where(np.isnan(x), _NAN, rounded)
