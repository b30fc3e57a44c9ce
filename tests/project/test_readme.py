"""A new user's way through the README: its commands, as they stand there, on the small model."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from engines import answers, bf16_answers
from tiny_models import SHIPPED

README = Path(__file__).parents[2] / "README.md"
MODEL = "./Qwen3-8B"  # as the README calls it


def commands_on(model: str) -> list[list[str]]:
    """Return the commands of the README's code blocks that name `model`, comments cut off."""
    blocks = README.read_text().split("\n```")[1::2]
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if f" {model}" in line]


@pytest.mark.engine
def test_compressing_checking_planning_serving_and_restoring_a_model_ends_where_it_began(
    tmp_path: Path,
) -> None:
    shutil.copytree(SHIPPED, tmp_path / MODEL)
    done = []
    for program, *arguments in commands_on(MODEL):
        if program == "vllm":  # test_engine_serve.py has the server; here the engine that it starts
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
