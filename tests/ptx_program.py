"""The code of a compiled kernel, read from PTX: its instructions, and where each label is."""

import re
from dataclasses import dataclass, field

Operand = str | list[str]

_LINE = re.compile(r"(?:@(!?)(%[\w.]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")


@dataclass
class Instruction:
    """One instruction.

    Attributes:
        negated, predicate: it runs where the predicate is true, or false if negated; "" for everywhere.
        base, kinds: its name, cut at the dots.
        operands: registers, numbers, [addresses], or lists of registers.
    """

    negated: bool
    predicate: str
    base: str
    kinds: list[str]
    operands: list[Operand]


@dataclass
class Program:
    """The code of one kernel, and how many threads a block has."""

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
            for part in line.split("//")[0].split(";"):
                self._add(part.strip(), assembly)

    def _add(self, text: str, assembly: int) -> None:
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
        base, *kinds = match[3].split(".")
        if base == "bra":
            operands = [self._scoped(str(operands[0]), assembly)]
        self.code.append(Instruction(match[1] == "!", match[2] or "", base, kinds, operands))

    @staticmethod
    def _scoped(label: str, assembly: int) -> str:
        """Return a name of its own for a label of inline assembly, where each piece has the same ones."""
        return label if label.startswith("$") else f"{label}@{assembly}"
