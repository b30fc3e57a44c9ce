"""The commands after `pip install vllm-dfloat` alone: without torch and transformers, which come with vLLM.

Files of the same names hide the packages, also from the processes that a command starts.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_commands import CONFIG
from dfloat11_helpers import VECTORS
from tiny_models import SHIPPED

ONLY_WITH_VLLM = ("torch", "transformers", "triton", "vllm", "safetensors", "matplotlib")
# Arguments: the commands as JSON. Prints [exit status, stdout, stderr] of each, and the packages that were loaded.
_PROGRAM = """
import contextlib, io, json, sys
from vllm_dfloat.cli import main

ended = []
for command in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([*command, "--quiet"])
    ended.append([status, out.getvalue(), err.getvalue()])
print(json.dumps([ended, sorted({name.partition(".")[0] for name in sys.modules})]))
"""
Endings = list[tuple[int, str, str]]


def run_without(
    packages: tuple[str, ...], commands: list[list[object]], folder: Path
) -> tuple[Endings, set[str]]:
    """Run commands without some packages; return how the commands ended, and which packages were loaded."""
    hidden = folder / "hidden"
    hidden.mkdir()
    for name in packages:
        text = f"raise ModuleNotFoundError(\"No module named '{name}'\", name='{name}')\n"
        (hidden / f"{name}.py").write_text(text)
    path = os.pathsep.join([str(hidden), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, json.dumps(commands, default=str)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    ended, loaded = json.loads(done.stdout)
    return [tuple(end) for end in ended], set(loaded)


def test_every_command_works_without_what_only_vllm_needs(tmp_path: Path) -> None:
    commands: list[list[object]] = [
        ["compress", SHIPPED, tmp_path / "df11", "--workers", "2"],
        ["inspect", tmp_path / "df11"],
        ["verify", tmp_path / "df11"],
        ["verify", tmp_path / "df11", "--against", SHIPPED],
        ["plan", tmp_path / "df11", "--gpu-memory", "24GiB"],
        ["decompress", tmp_path / "df11", tmp_path / "again", "--workers", "2"],
        ["verify", tmp_path / "again", "--against", SHIPPED],
        ["compress", VECTORS / "llama-tiny-single-bf16", tmp_path / "single"],
        ["plan", CONFIG, "--gpu-memory", "24GiB"],
    ]
    for official in sorted(VECTORS.glob("*-tiny*-df11")):
        commands += [["inspect", official], ["verify", official]]
    ended, loaded = run_without(ONLY_WITH_VLLM, commands, tmp_path)
    assert [(status, err) for status, _, err in ended] == [(0, "")] * len(commands)
    assert len(commands) > 15
    assert not loaded & set(ONLY_WITH_VLLM)
    assert {"numpy", "numba"} <= loaded


def test_what_is_not_checked_without_transformers_is_said(tmp_path: Path) -> None:
    # Bug caught: the same message as if the model's class had given its parameters.
    official, original = VECTORS / "llama-tiny-df11", VECTORS / "llama-tiny-single-bf16"
    commands: list[list[object]] = [
        ["verify", official, "--json"],
        ["decompress", official, tmp_path / "out", "--original", original, "--json"],
    ]
    ended, _ = run_without(ONLY_WITH_VLLM, commands, tmp_path)
    for status, out, err in ended:
        assert (status, err) == (0, "")
        assert json.loads(out)["not_sought"] == "torch and transformers are not installed"


def test_an_official_checkpoint_without_shapes_names_what_to_install_or_to_give(
    tmp_path: Path,
) -> None:
    official, original = VECTORS / "llama-tiny-single-df11", VECTORS / "llama-tiny-single-bf16"
    commands: list[list[object]] = [
        ["decompress", official, tmp_path / "a"],
        ["decompress", official, tmp_path / "b", "--original", original],
        ["decompress", official, tmp_path / "c", "--original", original / "config.json"],
        ["verify", tmp_path / "b", "--against", original],
    ]
    ended, _ = run_without(ONLY_WITH_VLLM, commands, tmp_path)
    assert [status for status, _, _ in ended] == [2, 0, 2, 0]
    assert ended[0][2] == (
        f"vllm-dfloat: {official}/config.json: the format stores no shapes, so they come from the model's config, "
        "for which torch and transformers are needed: ModuleNotFoundError: No module named 'transformers'. "
        "Install them: pip install torch transformers. "
        "With --original FOLDER, the weight files of the BF16 model tell them.\n"
    )
    assert "pip install torch transformers" in ended[2][2]
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("package", ["numpy", "numba", "tqdm", "huggingface_hub", "torch"])
def test_a_package_that_is_not_installed_is_one_sentence_with_the_pip_command(
    package: str, tmp_path: Path
) -> None:
    # Bug caught: "internal error, ModuleNotFoundError", which asks the user for a bug report.
    commands: dict[str, list[list[object]]] = {
        "huggingface_hub": [["compress", "some-org/some-model", tmp_path / "new"]],
        "torch": [["compress", SHIPPED, tmp_path / "new", "--device", "cuda"]],
    }
    general: list[list[object]] = [
        ["compress", SHIPPED, tmp_path / "new"],
        ["verify", VECTORS / "llama-tiny-df11"],
    ]
    ended, _ = run_without((package,), commands.get(package, general), tmp_path)
    for status, out, err in ended:
        assert status == 2
        assert out == ""
        (line,) = err.splitlines()
        assert "internal error" not in line
        assert f"pip install {package}" in line


def test_no_folder_for_compiled_code_is_one_sentence() -> None:
    # Bug caught: "internal error, RuntimeError: cannot cache function" in a read-only container without a home.
    places = {  # numba's only cache folder here, which cannot be written
        "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator",
        "NUMBA_CACHE_DIR": "/proc/nowhere",
    }
    done = subprocess.run(
        [sys.executable, "-m", "vllm_dfloat.cli", "verify", str(VECTORS / "llama-tiny-df11")],
        env={**os.environ, **places},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "vllm-dfloat: numba finds no folder that it may write compiled code to. Set NUMBA_CACHE_DIR to one.\n"
    )
