"""Compressed experts under vLLM's Triton kernels, which run in Triton's interpreter; see triton_experts.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
on_demand = pytest.mark.on_demand

pytestmark = pytest.mark.engine


def run(script: str, case: str, folder: Path, **environment: str) -> None:
    paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(TESTS / script), case, str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **environment},
        capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


@on_demand
@pytest.mark.parametrize("case", ["gated", "not_gated", "ranks", "adapters", "adapters_of_ranks"])
def test_compressed_experts_give_the_bits_of_bf16_experts(case: str, tmp_path: Path) -> None:
    run("triton_experts.py", case, tmp_path / "m")


@pytest.mark.parametrize(
    "case",
    [
        "gated",
        *(
            pytest.param(name, marks=on_demand)
            for name in (
                "not_gated",
                "weighted_input",
                "biased",
                "unequal",
                "ranks",
                "adapters",
                "adapters_of_ranks",
                "update",
            )
        ),
    ],
)
def test_few_tokens_are_multiplied_without_decoding_to_the_bits_of_bf16_experts(
    case: str, tmp_path: Path
) -> None:
    run("triton_products.py", case, tmp_path)


@on_demand
@pytest.mark.parametrize("case", ["gated", "weighted_input", "biased"])
@pytest.mark.parametrize("target", ["80", "90"])
def test_as_compiled_for_gpus_they_have_the_bits_of_bf16_experts_too(
    target: str, case: str, tmp_path: Path
) -> None:
    # vLLM's kernel and ours, both compiled; what is compared at load is compared so.
    run("triton_products.py", case, tmp_path, VLLM_DFLOAT_PTX=target)
