"""The tests of kernels on compiled code: launched by Triton as on a GPU, and run as PTX on a machine of NumPy arrays.

So what Triton makes of a launch's arguments is tested too, and guard pages see what compiled code reads and writes.
Here run kernels that no GPU has run; with --full all of them, compiled for two generations.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
NAMES = {
    "device": "decode_run experts fast_encode fast_experts fast_ops ops resident_units unit_ops",
    "integration": "fast_layers grouping heads products_in_order",
    "kernels": "decode_dfloat11_kernel decode_experts decode_group encode_dfloat11_kernel encode_kernel "
    "experts_product fast_bounds fast_decode fast_group fast_matmul_kernel kernel_bounds kernels matmul_kernel "
    "product_in_order rows_kernels_far_in",
}
FILES = [
    f"tests/{folder}/test_{name}.py" for folder, names in NAMES.items() for name in names.split()
]


def run(target: int, *selected: str) -> str:
    """Run tests with kernels compiled for sm_`target`; return the line that names the kernels that were launched."""
    environment = {**os.environ, "VLLM_DFLOAT_PTX": str(target)}
    paths = str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "ptx_plugin", *selected],
        env=environment | {"PYTHONPATH": os.pathsep.join(paths)}, cwd=TESTS.parent, capture_output=True, text=True,
        timeout=3600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("compiled for")]
    return line


def test_kernels_give_the_right_bits_as_compiled_and_launched() -> None:
    # By file, some tests of each form of a kernel; in one process, to save time.
    some = {
        "tests/device/test_fast_encode.py": "37 or 100 or transposed or no_access",
        "tests/kernels/test_fast_group.py": "triton and (hard or eights or damage)",
        "tests/device/test_fast_experts.py": "triton and not whole",
        "tests/kernels/test_experts_product.py": "sorted or other_ranks or specials",
    }
    chosen = " or ".join(f"({Path(file).stem} and ({names}))" for file, names in some.items())
    launched = run(90, *some, "-k", chosen)
    for kernel in ("count", "measure", "write", "fast_group", "fast_chosen", "experts"):
        assert f"_{kernel}_kernel" in launched, launched


@pytest.mark.on_demand
@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("file", FILES)
def test_all_kernels_give_the_right_bits_as_compiled_and_launched(file: str, target: int) -> None:
    run(target, file)
