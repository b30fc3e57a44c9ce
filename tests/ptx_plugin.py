"""Lets pytest run the tests of kernels on compiled code, without a GPU.

    VLLM_DFLOAT_PTX=90 PYTHONPATH=tests:. pytest -p ptx_plugin tests/kernels/test_fast_decode.py

What Triton's interpreter else runs is compiled for that target (sm_90), launched by Triton, and run as PTX by the
machine of ptx_machine.py, which stops at a barrier too few, and where a process would be ended by a wrong address.
"""

import os

os.environ.pop("TRITON_INTERPRET", None)
TARGET = int(os.environ.setdefault("VLLM_DFLOAT_PTX", "90"))

import ptx_driver  # noqa: E402  (after the variables)
import pytest  # noqa: E402
import triton  # noqa: E402

triton.knobs.runtime.interpret = False
os.environ["TRITON_INTERPRET"] = "1"  # the package wants it on a CPU

_launched = ptx_driver.install(TARGET)

from vllm_dfloat.kernels import configs, fast_matmul  # noqa: E402

CAPABILITY = divmod(TARGET, 10)
# What is launched there, and not what is quick in the interpreter.
configs.INTERPRETED = configs.config_for(
    "NVIDIA H100 80GB HBM3" if TARGET == 90 else "", CAPABILITY
)
fast_matmul._must_wait = lambda device: fast_matmul.must_wait(triton.__version__, CAPABILITY)  # type: ignore[assignment]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which kernels ran."""
    terminalreporter.write_line(f"compiled for sm_{TARGET}: {' '.join(sorted(set(_launched)))}")
