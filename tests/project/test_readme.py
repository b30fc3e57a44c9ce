"""The first steps of a new user: the commands of docs/checkpoints.md, unchanged, on the small model.

The README shows some of them, in the same words.
"""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from engines import answers, bf16_answers
from tiny_models import SHIPPED

ROOT = Path(__file__).parents[2]
README, DOC = ROOT / "README.md", ROOT / "docs" / "checkpoints.md"
MODEL = "./Qwen3-8B"  # as both call it


def commands_on(model: str, text: Path) -> list[list[str]]:
    """Return the commands of a text's code blocks that name `model`, comments cut off."""
    blocks = text.read_text().split("\n```")[1::2]
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if f" {model}" in line]


def test_the_readme_shows_commands_of_the_document_in_their_order() -> None:
    # Bug caught: a command that the test below does not run.
    shown = commands_on(MODEL, README)
    assert [arguments[0] for _, *arguments in shown] == ["compress", "verify", "plan", "serve"]
    assert shown == [command for command in commands_on(MODEL, DOC) if command in shown]


@pytest.mark.engine
def test_compressing_checking_planning_serving_and_restoring_a_model_ends_where_it_began(
    tmp_path: Path,
) -> None:
    shutil.copytree(SHIPPED, tmp_path / MODEL)
    done = []
    for program, *arguments in commands_on(MODEL, DOC):
        if program == "vllm":  # only its engine runs here; test_engine_serve.py tests the server
            assert arguments[0] == "serve"
            assert answers(tmp_path / arguments[1]) == bf16_answers(tmp_path / MODEL)
            done.append("serve")
            continue
        tool = Path(sys.executable).with_name(program)
        run = subprocess.run([tool, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, (arguments, run.stdout, run.stderr)
        done.append(arguments[0])
    assert done == ["compress", "inspect", "verify", "plan", "serve", "decompress"]
    files = [file for file in sorted(SHIPPED.rglob("*")) if file.is_file()]
    for file in files:
        again = tmp_path / f"{MODEL}-again" / file.relative_to(SHIPPED)
        assert again.read_bytes() == file.read_bytes(), file.name
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in files}
