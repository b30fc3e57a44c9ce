"""What the kernel report counts where rare paths are not taken, on machine code written by hand."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# A turn begins at 0x10 and ends at 0x80. Without escapes it jumps from 0x20 to 0x60; raw tiles are copied at 0x50.
TURN = """
    S2R R0, SR_TID.X
    LDG.E.64 R2, [R4]
    @!P0 BRA 0x60
    @P1 BRA 0x50
    PRMT R2, R2, R3, R4
    LDG.E R2, [R6]
    NOP
    HMMA.16816.F32.BF16 R8, R2, R4, R8
    @P2 BRA 0x10
    STG.E.128 [R8], R12
    EXIT
    BRA 0xb0
"""
# A program with a wrong seal leaves at 0x10. The loop from 0x20 to 0x50 stores 16 bytes a thread at a time.
PROGRAM = """
    LDG.E.64 R2, [R4]
    @P0 EXIT
    @!P1 BRA 0x40
    STG.E.U16 [R6], R2
    STG.E.128 [R8], R12
    @P2 BRA 0x20
    BRA.DIV UR4, 0x80
    EXIT
    BRA 0x70
"""


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    yield
    for name in [name for name in sys.modules if name.startswith("compile_specs")]:
        del sys.modules[name]


def sass(code: str) -> str:
    lines = [line.strip() for line in code.strip().splitlines()]
    return "".join(
        f"        /*{16 * i:04x}*/    {line} ;   /* 0x0 */\n" for i, line in enumerate(lines)
    )


def test_a_turn_without_escapes_is_counted_and_its_padding_is_not() -> None:
    from compile_specs import paths

    # The load, the branch, the product and the branch back.
    assert paths.turn(sass(TURN), [(0x10, 0x80)]) == 4
    assert paths.turn(sass(TURN), [(0x30, 0x50)]) is None  # nothing is multiplied there


def test_a_program_that_stores_all_is_counted_with_every_turn_of_its_loop() -> None:
    # Bug caught: the path of a program that stores nothing, which is shorter; or a loop that counts once.
    from compile_specs import paths

    loops = [(0x20, 0x50)]
    assert paths.program(sass(PROGRAM), loops, 1) == 2 + 3 + 2
    assert paths.program(sass(PROGRAM), loops, 4) == 2 + 4 * 3 + 2
    assert paths.program(sass(PROGRAM), [], 4) is None
    assert paths.program(sass(TURN), [(0x10, 0x80)], 1) == 1 + 4 + 2


def test_a_jump_to_where_only_a_register_says_is_refused() -> None:
    from compile_specs import paths

    with pytest.raises(ValueError, match="BRX R2: where it goes is not known"):
        paths.graph_of(sass("BRX R2\nEXIT"))
