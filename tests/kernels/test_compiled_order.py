"""Products in order as compiled for GPUs, beside those of vLLM that they replace, compiled for the same ones.

Both run on a machine of NumPy arrays (ptx_machine.py), whose tensor cores show any other order of their steps.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_dfloat.kernels.fast_matmul import must_wait

TESTS = Path(__file__).parents[1]


def run(script: str, folder: Path) -> Any:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), env.get("PYTHONPATH", "")])
    command = [sys.executable, TESTS / script, folder]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    return run("compiled_products.py", tmp_path_factory.mktemp("vllm"))  # type: ignore[no-any-return]


def test_compiled_product_in_order_takes_the_steps_that_vllm_takes(
    result: dict[str, dict[str, int]],
) -> None:
    # Bug caught: Triton takes 32 columns for two steps where a thread has 4 neighbours of an operand.
    cases = {name: count for name, count in result["unequal"].items() if name.startswith("sm_")}
    assert len(cases) == 14
    assert not any(cases.values()), cases


def test_compiled_product_in_another_order_is_seen(result: dict[str, dict[str, int]]) -> None:
    cases = {name: count for name, count in result["unequal"].items() if not re.match("sm_", name)}
    assert len(cases) == 4
    assert min(cases.values()) > 100


def test_compiled_product_with_experts_takes_the_steps_that_vllm_takes(tmp_path: Path) -> None:
    cases = run("compiled_experts.py", tmp_path)
    assert len(cases) == 4
    assert not any(cases.values()), cases


@pytest.mark.parametrize(
    ("triton_version", "capability", "expected"),
    [
        ("3.6.0", (9, 0), True),
        ("3.7.1", (9, 0), True),
        ("3.8.0", (9, 0), False),
        ("3.10.0+git", (9, 0), False),
        ("3.6.0", (8, 0), False),
        ("3.6.0", (10, 0), False),
    ],
)
def test_a_turn_waits_for_its_product_where_triton_would_overwrite_weights_that_are_still_read(
    triton_version: str, capability: tuple[int, int], expected: bool
) -> None:
    # Bug caught: registers of weights written for the next turn while steps of the tensor cores were not done.
    assert must_wait(triton_version, capability) == expected
