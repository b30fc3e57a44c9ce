"""Where a compiled kernel waits for what it loads, read from the control words of its machine code (sm_80 and later).

    python tests/sass_waits.py KERNEL ...     # names of kernel_report.py; prints JSON

An instruction is 128 bits. Six counters tell which loads have arrived: a load raises one, and an instruction may wait
until some are back at zero. Of the upper word bits 46 to 48 are a load's counter (7: none), 52 to 57 those waited for.
"""

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

os.environ.pop("TRITON_INTERPRET", None)
sys.path.append(str(Path(__file__).parents[1] / "scripts"))

import kernel_report

_LINE = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(.*?);\s+/\* 0x[0-9a-f]{16} \*/\s+/\* 0x([0-9a-f]{16}) \*/", re.DOTALL
)
_BACK = re.compile(r"\bBRA\b.*0x([0-9a-f]+)$")
_WIDE = re.compile(r"LDG\.E\.(EF\.)?64 "), re.compile(r"LDG\.E\.(EF\.)?128 ")  # of weights


class Instruction(NamedTuple):
    """address; text; counter: that a load raises, or 7; waits: a bit for each counter."""

    address: int
    text: str
    counter: int
    waits: int


def instructions(sass: str) -> list[Instruction]:
    return [
        Instruction(int(at, 16), text.strip(), int(word, 16) >> 46 & 7, int(word, 16) >> 52 & 63)
        for at, text, word in _LINE.findall(sass)
    ]


def loop_over_weights(code: list[Instruction]) -> list[Instruction]:
    """Return the shortest loop that loads weights and multiplies on the tensor cores."""
    loops = []
    for one in code:
        target = _BACK.search(one.text)
        if target and int(target[1], 16) < one.address:
            body = [each for each in code if int(target[1], 16) <= each.address <= one.address]
            texts = " ".join(each.text for each in body)
            if "HMMA" in texts and all(kind.search(texts) for kind in _WIDE):
                loops.append(body)
    return min(loops, key=len)


def late_waits(body: list[Instruction]) -> list[str]:
    """Return what waits, after the loads of weights for the next turn, for the counter that these raise.

    Where a tile has more than 32 escapes, further entries are loaded and waited for: that is not counted.
    """
    # Each turn loads nibbles first; activations may be loaded as widely, later.
    first = next(i for i, one in enumerate(body) if _WIDE[0].match(one.text))
    counter = body[first].counter
    found = []
    for i, one in enumerate(body[first:], first):
        entries = any("+0x80]" in each.text for each in body[max(0, i - 4) : i])
        if one.waits >> counter & 1 and not entries:
            found.append(f"{one.address:#x} {one.text}")
    return found


def main() -> int:
    waits = {}
    for spec in kernel_report.specs():
        if spec.name not in sys.argv[1:]:
            continue
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(spec.compile("sm_90").asm["cubin"])
            file.flush()
            sass = kernel_report.dump("--dump-sass", Path(file.name))
        waits[spec.name] = late_waits(loop_over_weights(instructions(sass)))
    json.dump(waits, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
