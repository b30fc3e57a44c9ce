"""The commands of docs/planning.md, unchanged, in a clone without a network; and the README's number."""

import re
import shlex
from pathlib import Path

import pytest

from vllm_dfloat.cli import main

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "docs" / "planning.md").read_text()
BLOCKS = [block.split("\n", 1) for block in re.findall(r"```\n\$ (.*?)\n```", SECTION, re.DOTALL)]
ROWS = [line for line in SECTION.splitlines() if line.startswith("| `") or line.startswith("| |")]


def run(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    program, *arguments = shlex.split(command)
    assert program == "vllm-dfloat"
    monkeypatch.chdir(ROOT)
    assert main(arguments) == 0
    return capsys.readouterr().out


def test_the_commands_are_there() -> None:
    assert len(BLOCKS) == 2
    assert len(ROWS) == 14


@pytest.mark.parametrize(("command", "output"), BLOCKS)
def test_a_command_prints_what_the_document_shows(
    command: str, output: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command, monkeypatch, capsys).splitlines() == output.splitlines()


@pytest.mark.parametrize("at", range(0, len(ROWS), 2))
def test_the_table_has_the_numbers_of_its_commands(
    at: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bf16, dfloat11 = (
        [cell.strip() for cell in row.strip("|").split("|")] for row in ROWS[at : at + 2]
    )
    found = run(bf16[0].strip("`"), monkeypatch, capsys)
    columns = (
        "weights",
        "scratch",
        "other",
        "left for the KV cache",
        "KV tokens",
        "longest context",
    )
    for name, *cells in zip(columns, bf16[2:], dfloat11[2:], strict=True):
        (line,) = (line for line in found.splitlines() if line.startswith(f"{name}  "))
        shown = re.split(r"\s{2,}", line.removeprefix(name).strip())[:2]
        # a model that does not load has no tokens
        assert [{"does not load": "0", "-": shown[0]}.get(cells[0], cells[0]), cells[1]] == shown


def test_the_readme_has_the_planned_weights_of_its_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "README.md").read_text()
    (row,) = (line for line in text.splitlines() if line.startswith("|") and "planned (3)" in line)
    (command,) = re.findall(r"^\(3\) (.*)$", text, re.MULTILINE)
    (line,) = (
        line
        for line in run(command, monkeypatch, capsys).splitlines()
        if line.startswith("weights ")
    )
    assert [cell.strip() for cell in row.strip("|").split("|")][1:] == re.findall(
        r"([\d.]+) GiB", line
    )
