"""The allowed imports between parts, checked in every source file, and the modules that an import really loads."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Part of the package -> parts it may import, all above it. A part is a module or folder directly below vllm_dfloat.
ALLOWED = {
    "__init__": set(),
    "errors": set(),
    "codec": {"errors"},
    "storage": {"errors", "codec"},
    "dfloat11": {"errors", "codec", "storage"},
    "checkpoint": {"errors", "codec.arrays", "storage", "dfloat11"},
    "convert": {"errors", "codec", "storage", "dfloat11", "checkpoint"},
    "plan": {"errors", "codec", "storage", "checkpoint", "dfloat11.format"},
    "kernels": {"codec.layout", "codec.fast_layout", "codec.descriptor", "dfloat11.format"},
    "device": {"errors", "codec", "dfloat11", "kernels"},
    "commands": {
        "errors", "codec", "dfloat11", "checkpoint", "convert", "plan", "device.unit_coder",
    },
    "cli": {"errors", "commands", "__init__"},
    "integration": {"errors", "codec", "storage", "checkpoint", "plan", "device", "__init__"},
}  # fmt: skip
# The folders of integration/. Each may import those before it; modules directly in integration/, "", may import all.
INTEGRATION = ["seam", "layers", "compiling", "updating", "loading", ""]
# Distribution -> the parts that may import it at all, inside functions included.
ONLY_IN = {
    "vllm": {"integration"},
    "triton": {"kernels"},
    "torch": {"checkpoint", "kernels", "device", "integration"},
    "transformers": {"checkpoint", "integration"},
}


def source_files() -> list[Path]:
    """Return all modules; those of the link vllm_dfloat/kernels with the path by which they are imported."""
    package = ROOT / "vllm_dfloat"
    files = [path for path in package.rglob("*.py") if "kernels" not in path.parts]
    files += [package / "kernels" / path.name for path in (ROOT / "kernels").glob("*.py")]
    return sorted(files)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in source_files()}


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted name of every module a source imports, `from package import module` resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in MODULES else base


def part_of(name: str) -> str:
    """Return the part of the package to which a module belongs."""
    return [*name.split("."), "__init__"][1]


def forbidden_imports(name: str, source: str) -> list[str]:
    """Return what module `name` must not import but does."""
    part, found = part_of(name), []
    for target in imported_names(ast.parse(source)):
        top = target.split(".")[0]
        if top == "vllm_dfloat":
            inner = target.removeprefix("vllm_dfloat.")
            allowed = ALLOWED[part] | {part}
            if not any((inner + ".").startswith(a + ".") for a in allowed) and not (
                target == "vllm_dfloat" and "__init__" in allowed
            ):
                found.append(target)
        elif top == "" or part not in ONLY_IN.get(top, {part}):
            found.append(target)
    return found


@pytest.mark.parametrize("name", MODULES)
def test_module_imports_only_what_its_part_may(name):
    assert forbidden_imports(name, MODULES[name].read_text()) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("vllm_dfloat.codec.decode", "def f():\n    import vllm.envs"),
        ("vllm_dfloat.codec.decode", "from vllm_dfloat.device import ops"),
        ("vllm_dfloat.dfloat11.unit", "from vllm_dfloat.integration.config import X"),
        ("vllm_dfloat.kernels.packed_decode", "from vllm_dfloat.codec.encode import encode"),
        ("vllm_dfloat.kernels.dfloat11_block", "from vllm_dfloat.dfloat11.unit import Unit"),
        ("vllm_dfloat.device.ops", "import triton.language as tl"),
        ("vllm_dfloat.errors", "from vllm_dfloat import __version__"),
        ("vllm_dfloat.codec.decode", "from . import layout"),  # relative: not used in this tree
    ],
)
def test_import_check_sees_a_forbidden_import(name, source):
    # Bug caught: a checker that resolves names wrongly, and accepts every file.
    assert len(forbidden_imports(name, source)) == 1


def test_every_part_of_the_package_has_a_rule():
    assert {part_of(name) for name in MODULES} <= set(ALLOWED)


def test_every_part_imports_earlier_ones_only():
    parts = list(ALLOWED)
    for part, allowed in ALLOWED.items():
        assert all(parts.index(name.split(".")[0]) < parts.index(part) for name in allowed), part


def test_contributors_are_told_these_directions() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    told = {
        part.strip(): set(re.findall(r"`([\w.]+)`", imports))
        for part, _, imports in (row for row in rows if len(row) == 3)
        if part.strip() in ALLOWED
    }
    rules = {part: allowed - {"__init__"} for part, allowed in ALLOWED.items()}
    assert told == {part: allowed for part, allowed in rules.items() if part != "__init__"}


def room_in_integration(name: str) -> str:
    """Return the folder of a module in integration/, "" for a module directly in it."""
    parts = name.split(".")[2:]
    return parts[0] if len(parts) > 1 else ""


@pytest.mark.parametrize("name", [name for name in MODULES if part_of(name) == "integration"])
def test_folders_of_integration_import_earlier_ones_only(name):
    room = INTEGRATION.index(room_in_integration(name))
    for target in imported_names(ast.parse(MODULES[name].read_text())):
        if target.startswith("vllm_dfloat.integration."):
            assert INTEGRATION.index(room_in_integration(target)) <= room, target


def loaded_by(statement: str, cwd: Path) -> set[str]:
    """Return the names in sys.modules after `statement` in a fresh interpreter."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


def import_all(*parts: str) -> str:
    """Return a statement that imports every module of some parts."""
    names = [name for name in MODULES if part_of(name) in parts]
    assert names
    return "import " + ", ".join(names)


def test_importing_the_package_loads_neither_torch_nor_vllm(tmp_path):
    loaded = loaded_by("import vllm_dfloat", tmp_path)
    assert "vllm_dfloat" in loaded
    assert not loaded & {"torch", "vllm", "triton", "numba", "numpy"}


def test_codec_loads_no_torch_triton_or_vllm(tmp_path):
    loaded = loaded_by(import_all("errors", "codec"), tmp_path)
    assert not loaded & {"torch", "triton", "vllm"}


def test_checkpoint_and_command_line_load_no_triton_or_vllm(tmp_path):
    loaded = loaded_by(
        import_all("storage", "dfloat11", "checkpoint", "convert", "plan", "cli", "commands"),
        tmp_path,
    )
    assert not loaded & {"triton", "vllm"}


def test_kernels_load_no_vllm(tmp_path):
    loaded = loaded_by(import_all("kernels"), tmp_path)
    assert "vllm_dfloat.kernels.packed_decode" in loaded
    assert "vllm" not in loaded


def test_importing_the_plugin_loads_no_torch_triton_or_vllm(tmp_path):
    # vLLM imports the entry point in every process it starts, before it chooses a device.
    loaded = loaded_by("import vllm_dfloat.integration.plugin", tmp_path)
    assert not loaded & {"torch", "triton", "vllm"}


def test_register_loads_no_kernel_and_initialises_no_cuda(tmp_path):
    statement = (
        "from vllm_dfloat.integration.plugin import register\n"
        "register()\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()"
    )
    loaded = loaded_by(statement, tmp_path)
    assert "vllm" in loaded
    assert not {name for name in loaded if name.startswith("vllm_dfloat.kernels.")}
