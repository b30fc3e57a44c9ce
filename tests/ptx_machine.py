"""Run a compiled kernel without a GPU: the instructions of PTX that our products and vLLM's use, on NumPy arrays.

All threads of a block are in one process: each step runs the threads that are furthest behind. The tensor cores are
those of tensor_cores.py. An instruction or a form of one that no such kernel uses is an error.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from tensor_cores import from_bf16, product

U64 = np.uint64
Operand = str | list[str]

_LINE = re.compile(r"(?:@(!?)(%[\w.]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")


@dataclass
class Instruction:
    negated: bool
    predicate: str
    name: str
    operands: list[Operand]


@dataclass
class Program:
    """The code of one kernel: its instructions, and where each label is."""

    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    threads: int = 32

    def __init__(self, ptx: str) -> None:
        self.code, self.labels = [], {}
        found = re.search(r"\.reqntid (\d+)", ptx)
        assert found
        self.threads = int(found[1])
        body = ptx[ptx.index("{", found.end()) + 1 :]
        assembly = 0
        for line in body.splitlines():
            assembly += "begin inline asm" in line
            inside = f"@{assembly}" if "%" not in line.split(":")[0] and assembly else ""
            for part in line.split("//")[0].split(";"):
                self._add(part.strip(), assembly, inside)

    def _add(self, text: str, assembly: int, inside: str) -> None:
        label = re.match(r"([$\w]+):\s*(.*)", text)
        if label:
            self.labels[self._scoped(label[1], assembly)] = len(self.code)
            text = label[2]
        text = text.removeprefix("{").strip() if not _LINE.match(text) else text
        match = _LINE.match(text)
        if match is None or text.startswith("."):
            return
        operands: list[Operand] = []
        for one in _OPERAND.findall(match[4]):
            operands.append(re.findall(r"[^{},\s]+", one) if one[0] == "{" else one)
        if match[3].startswith("bra"):
            operands = [self._scoped(str(operands[0]), assembly)]
        self.code.append(Instruction(match[1] == "!", match[2] or "", match[3], operands))

    @staticmethod
    def _scoped(label: str, assembly: int) -> str:
        """Return a name of its own for a label of inline assembly, where each piece has the same ones."""
        return label if label.startswith("$") else f"{label}@{assembly}"


def _signed(x: np.ndarray, bits: int) -> np.ndarray:
    return x.astype(f"u{bits // 8}").view(f"i{bits // 8}").astype(np.int64)


def _f32(x: np.ndarray) -> np.ndarray:
    return x.astype(np.uint32).view(np.float32)


def _to_bf16(x: np.ndarray) -> np.ndarray:
    """Return the bits of finite FP32 numbers, rounded to nearest with ties to even."""
    bits = x.astype(np.float32).view(np.uint32).astype(U64)
    return (bits + U64(0x7FFF) + ((bits >> U64(16)) & U64(1))) >> U64(16)


_BINARY: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "min": np.minimum, "max": np.maximum,
    "div": lambda a, b: np.where(b == 0, 0, np.abs(a) // np.maximum(np.abs(b), 1) * np.sign(a) * np.sign(b)),
    "rem": lambda a, b: a - np.where(b == 0, 0, np.abs(a) // np.maximum(np.abs(b), 1) * np.sign(a) * np.sign(b)) * b,
}  # fmt: skip
_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


class Machine:
    """One block of threads, with global memory as bytes from address 0 on, and shared memory of its own."""

    def __init__(
        self, program: Program, memory: np.ndarray, parameters: list[int], block: tuple[int, int],
        blocks: tuple[int, int], shared: int,
    ) -> None:  # fmt: skip
        self.program, self.memory = program, memory
        self.parameters = parameters
        self.shared = np.zeros(shared + 16, np.uint8)
        n = program.threads
        self.registers: dict[str, np.ndarray] = {}
        self.tid = np.arange(n)
        special = {"%tid.x": self.tid, "%laneid": self.tid % 32}
        special |= {"%ctaid.x": block[0], "%ctaid.y": block[1], "%nctaid.x": blocks[0]}
        special |= {"%nctaid.y": blocks[1], "%ntid.x": n}
        self.special = {k: np.broadcast_to(np.asarray(v, U64), n) for k, v in special.items()}
        self.pc = np.zeros(n, np.int64)
        self.active = np.ones(n, bool)
        self.steps = 0

    def run(self) -> None:
        end = len(self.program.code)
        while True:
            at = int(self.pc.min())
            if at == end:
                return
            here = self.pc == at
            one = self.program.code[at]
            self.active = here
            if one.predicate:
                self.active = here & (self._read(one.predicate) != 0) ^ (here & one.negated)
            self.pc[here] += 1
            self._execute(one, here)
            self.steps += 1
            assert self.steps < 200_000, "the kernel does not end"

    # Operands.

    def _read(self, operand: Operand) -> np.ndarray:
        assert isinstance(operand, str)
        n = self.program.threads
        if operand in self.special:
            return self.special[operand]
        if operand[0] == "%":
            return self.registers.setdefault(operand, np.zeros(n, U64))
        if operand == "global_smem":
            return np.zeros(n, U64)
        if operand[:2] in ("0f", "0F"):
            return np.full(n, int(operand[2:], 16), U64)
        return np.full(n, int(operand.rstrip("U"), 0) & 0xFFFF_FFFF_FFFF_FFFF, U64)

    def _write(self, operand: Operand, value: np.ndarray, bits: int) -> None:
        assert isinstance(operand, str)
        value = np.asarray(value)
        wide = value.astype(np.int64).view(U64) if value.dtype.kind == "i" else value.astype(U64)
        if bits < 64:
            wide = wide & U64((1 << bits) - 1)
        self.registers[operand] = np.where(self.active, wide, self._read(operand))

    def _address(self, operand: Operand) -> np.ndarray:
        assert isinstance(operand, str)
        parts = [part.strip() for part in operand.strip("[] ").split("+")]
        total = self._read(parts[0]).astype(np.int64)
        for part in parts[1:]:
            total = total + self._read(part).astype(np.int64)
        return total

    def _load(self, memory: np.ndarray, address: np.ndarray, size: int) -> np.ndarray:
        safe = np.where(self.active, address, 0)
        assert safe.min() >= 0
        assert safe.max() + size <= len(memory)
        assert not (safe % size).any(), "an address that no GPU reads"
        found = memory[safe[:, None] + np.arange(size)]
        return np.ascontiguousarray(found).view(f"<u{size}")[:, 0].astype(U64)

    def _store(self, memory: np.ndarray, address: np.ndarray, value: np.ndarray, size: int) -> None:
        where = address[self.active]
        if len(where):
            assert where.min() >= 0
            assert where.max() + size <= len(memory)
            each = value[self.active].astype(f"<u{size}")[:, None].view(np.uint8)
            memory[where[:, None] + np.arange(size)] = each

    # Instructions.

    def _execute(self, one: Instruction, here: np.ndarray) -> None:
        base, *kinds = one.name.split(".")
        if base == "bra":
            self.pc[self.active] = self.program.labels[str(one.operands[0])]
        elif base == "ret":
            self.pc[self.active] = len(self.program.code)
        elif base == "bar":
            assert here.all(), "some threads do not come to the barrier"
        elif base == "trap":
            assert not self.active.any(), "the kernel was stopped"
        elif base in ("ld", "st"):
            self._move_memory(base, kinds, one.operands)
        elif base == "cp":
            self._copy(kinds, one.operands)
        elif base in ("ldmatrix", "stmatrix"):
            self._move_matrices(base, one.operands)
        elif base == "shfl":
            lane = self._read(one.operands[2]).astype(np.int64)
            if kinds[1] == "bfly":
                lane ^= self.tid % 32
            else:
                assert kinds[1] == "idx"
            self._write(
                one.operands[0], self._read(one.operands[1])[self.tid // 32 * 32 + lane], 32
            )
        elif base == "vote":
            self._vote(one.operands)
        elif base == "mma":
            self._multiply(one.operands)
        else:
            self._compute(base, kinds, one.operands)

    def _move_memory(self, base: str, kinds: list[str], operands: list[Operand]) -> None:
        size = int(kinds[-1][1:]) // 8
        if kinds[0] == "param":
            name = str(operands[1]).strip("[] ")
            value = self.parameters[int(name.rpartition("_")[2])]
            self._write(operands[0], np.full(self.program.threads, value, U64), size * 8)
            return
        memory = self.memory if kinds[0] == "global" else self.shared
        target, place = operands if base == "ld" else reversed(operands)
        address = self._address(place)
        for i, register in enumerate(target if isinstance(target, list) else [target]):
            if base == "ld":
                self._write(register, self._load(memory, address + i * size, size), size * 8)
            else:
                self._store(memory, address + i * size, self._read(register), size)

    def _copy(self, kinds: list[str], operands: list[Operand]) -> None:
        if "commit_group" in kinds or "wait_group" in kinds:
            return
        target, source, size = self._address(operands[0]), self._address(operands[1]), operands[2]
        given = self._read(operands[3]) if len(operands) > 3 else self._read(size)
        for i in range(int(str(size), 0)):
            kept = self.active
            self.active = kept & (i < given)
            value = self._load(self.memory, source + i, 1)
            self.active = kept
            self._store(self.shared, target + i, np.where(i < given, value, U64(0)), 1)

    def _move_matrices(self, base: str, operands: list[Operand]) -> None:
        """Move 8 x 8 matrices of 16 bits between shared memory and registers; a thread gives the address of a row."""
        held, place = operands if base == "ldmatrix" else reversed(operands)
        rows = self._address(place).reshape(-1, 32)
        for i, register in enumerate(held):
            row = rows[:, i * 8 + np.arange(32) // 4].ravel() + 4 * (self.tid % 4)
            if base == "ldmatrix":
                self._write(register, self._load(self.shared, row, 4), 32)
            else:
                self._store(self.shared, row, self._read(register), 4)

    def _vote(self, operands: list[Operand]) -> None:
        """Give each thread of a warp a bit for each of its threads where the predicate holds."""
        assert self.active.all(), "a vote without all threads"
        bits = (self._read(operands[1]) != 0).reshape(-1, 32).astype(U64) << np.arange(
            32, dtype=U64
        )
        self._write(operands[0], np.repeat(bits.sum(1), 32), 32)

    def _multiply(self, operands: list[Operand]) -> None:
        assert self.active.all(), "a step of the tensor cores without all threads"
        d, a, b, c = operands
        warps = self.program.threads // 32
        lane = np.arange(32)
        row, quad = lane // 4, lane % 4

        def halves(register: str) -> np.ndarray:
            word = self._read(register).reshape(warps, 32).astype(np.uint32)
            return np.stack([from_bf16(word & 0xFFFF), from_bf16(word >> 16)], -1)

        left = np.zeros((warps, 16, 16), np.float32)
        right = np.zeros((warps, 16, 8), np.float32)
        acc = np.zeros((warps, 16, 8), np.float32)
        for one in range(2):
            for i, register in enumerate(a):
                left[:, row + 8 * (i % 2), 2 * quad + one + 8 * (i // 2)] = halves(register)[
                    ..., one
                ]
            for i, register in enumerate(b):
                right[:, 2 * quad + one + 8 * i, row] = halves(register)[..., one]
            for i in range(2):
                value = _f32(self._read(c[2 * i + one])).reshape(warps, 32)
                acc[:, row + 8 * i, 2 * quad + one] = value
        result = product(left, right, acc)
        for one in range(2):
            for i in range(2):
                value = result[:, row + 8 * i, 2 * quad + one].ravel()
                self._write(d[2 * i + one], value.view(np.uint32), 32)

    def _compute(self, base: str, kinds: list[str], operands: list[Operand]) -> None:
        kind = kinds[-1]
        bits = 1 if kind == "pred" else int(re.sub(r"\D", "", kind.removesuffix("x2")) or 32)
        if base == "mov":
            if isinstance(operands[1], list):  # two halves into one
                low, high = map(self._read, operands[1])
                self._write(operands[0], low | high << U64(bits // 2), bits)
            elif isinstance(operands[0], list):
                value = self._read(operands[1])
                for i, register in enumerate(operands[0]):
                    self._write(register, value >> U64(i * bits // 2), bits // 2)
            else:
                self._write(operands[0], self._read(operands[1]), bits)
            return
        values = [self._read(operand) for operand in operands[1:]]
        is_float = kind == "f32" or "bf16" in kind
        if base == "setp":
            self._compare(kinds, operands, values, bits, is_float)
        elif base == "selp":
            self._write(operands[0], np.where(values[2] != 0, values[0], values[1]), bits)
        elif base == "cvt":
            self._convert(kinds, operands[0], values)
        elif base == "prmt":
            self._write(operands[0], _permuted(*values), 32)
        elif base == "shf":
            self._write(operands[0], _funnel(kinds[0], *values), 32)
        elif base == "brev":
            bits_of = (values[0][:, None] >> np.arange(32, dtype=U64)) & U64(1)
            self._write(operands[0], (bits_of << np.arange(31, -1, -1, dtype=U64)).sum(1), 32)
        elif base == "bfind":
            assert kinds[0] == "shiftamt"
            assert values[0].all()
            self._write(operands[0], 31 - np.log2(values[0]).astype(np.int64), 32)
        elif base == "bfe":
            value = values[0] >> values[1]
            length = int(values[2][0])
            value &= U64((1 << length) - 1)
            if kind[0] == "s":
                value = (value.astype(np.int64) << (64 - length)) >> (64 - length)
            self._write(operands[0], value, bits)
        elif is_float:
            floats = [_f32(value) for value in values]
            assert (base, kind) == ("add", "f32"), base
            self._write(operands[0], (floats[0] + floats[1]).view(np.uint32), 32)
        else:
            self._integers(base, kinds, operands[0], values, bits)

    def _integers(
        self, base: str, kinds: list[str], target: Operand, values: list[np.ndarray], bits: int
    ) -> None:
        is_signed = kinds[-1][0] == "s"
        if base in ("shl", "shr"):
            amount = np.minimum(values[1], U64(63)).astype(np.int64)
            value = _signed(values[0], bits) if is_signed else values[0].astype(np.int64)
            if base == "shr" and not is_signed and bits == 64:
                self._write(target, values[0] >> amount.astype(U64), bits)
                return
            self._write(target, value << amount if base == "shl" else value >> amount, bits)
            return
        if bits == 64 and not is_signed:
            whole = [value.view(np.int64) for value in values]
        elif bits == 1:
            whole = [value.astype(np.int64) for value in values]
        else:
            whole = [
                _signed(value, bits)
                if is_signed
                else (value & U64((1 << bits) - 1)).astype(np.int64)
                for value in values
            ]
        if base in ("mul", "mad"):
            result = whole[0] * whole[1]
            if "hi" in kinds:
                result >>= bits
            if base == "mad":
                is_wide = "wide" in kinds
                result = result + (values[2].view(np.int64) if is_wide else whole[2])
            self._write(target, result, 2 * bits if "wide" in kinds else bits)
        else:
            self._write(target, _BINARY[base](whole[0], whole[1]), bits)

    def _compare(
        self, kinds: list[str], operands: list[Operand], values: list[np.ndarray], bits: int, is_float: bool
    ) -> None:  # fmt: skip
        if kinds[0] == "num":
            self._write(operands[0], ~np.isnan(_f32(values[0]) + _f32(values[1])), 1)
            return
        if is_float:
            a, b = map(_f32, values[:2])
        elif kinds[-1][0] == "s":
            a, b = (_signed(value, bits) for value in values[:2])
        else:
            a, b = ((value & U64((1 << bits) - 1)) if bits < 64 else value for value in values[:2])
        result = _COMPARE[kinds[0]](a, b)
        if len(kinds) == 3:
            assert kinds[1] == "and"
            result = result & (values[2] != 0)
        self._write(operands[0], result, 1)

    def _convert(self, kinds: list[str], target: Operand, values: list[np.ndarray]) -> None:
        kinds = [kind for kind in kinds if kind != "rn"]
        if kinds == ["bf16x2", "f32"]:
            high, low = (_to_bf16(_f32(value)) for value in values)
            self._write(target, low | high << U64(16), 32)
        elif kinds == ["f32", "bf16"]:
            self._write(target, values[0] << U64(16), 32)
        else:
            to, source = (int(kind[1:]) for kind in kinds)
            value = _signed(values[0], source) if kinds[1][0] == "s" else values[0]
            self._write(target, value, to)


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
