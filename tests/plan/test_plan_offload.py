"""--cpu-offload-gb in a plan: what it takes off the GPU, in the table, in JSON and in the picture."""

import json
from pathlib import Path

import pytest

from vllm_dfloat.cli import main
from vllm_dfloat.plan.memory import Settings
from vllm_dfloat.plan.offload import BlockWeight, bf16_on_host, dfloat11_on_host
from vllm_dfloat.plan.picture import _bars
from vllm_dfloat.plan.plan import make_plan

CONFIG = str(Path(__file__).parents[1] / "data" / "configs" / "Llama-3.1-8B.json")
GIB = 1 << 30
NORM = BlockWeight(10, 10, False, True)
LAYER = BlockWeight(1000, 670, True, False)
ROUTER = BlockWeight(200, 200, False, False)


@pytest.mark.parametrize(
    ("budget", "bf16", "dfloat11"),
    [
        (0, 0, 0),
        (150, 1010, 0),  # vLLM stops at the first weight that reaches the budget
        (200, 1010, 200),
        (1500, 2020, 870),  # the router, and one layer
        (1600, 2020, 200 + 2 * 670),
        (10**6, 2220, 200 + 2 * 670),
    ],
)
def test_weights_go_to_the_host_up_to_the_budget(budget: int, bf16: int, dfloat11: int) -> None:
    weights = [NORM, LAYER, NORM, LAYER, ROUTER]
    assert bf16_on_host(weights, budget) == bf16
    assert dfloat11_on_host(weights, budget) == dfloat11


def test_what_is_on_the_host_is_left_for_the_kv_cache_on_the_gpu() -> None:
    without, given = (
        make_plan(CONFIG, Settings(gpu_memory=24 * GIB, cpu_offload=n * GIB)) for n in (0, 4)
    )
    (rank,), (before,) = given.ranks, without.ranks
    assert (before.bf16_host, before.dfloat11_host) == (0, 0)
    assert 3.8 * GIB < rank.dfloat11_host <= 4 * GIB <= rank.bf16_host < 4.3 * GIB
    assert given.dfloat11.kv_bytes[0] == without.dfloat11.kv_bytes[0] + rank.dfloat11_host
    assert given.bf16.kv_bytes[0] == without.bf16.kv_bytes[0] + rank.bf16_host
    assert rank.loading_peak == before.loading_peak - rank.dfloat11_host
    assert given.dfloat11.tokens > without.dfloat11.tokens
    plain, packed = _bars(given)
    assert packed.parts["weights"] == rank.dfloat11_weights - rank.dfloat11_host
    assert plain.parts["weights"] == rank.bf16_weights - rank.bf16_host
    assert packed.name.endswith("in host memory")


def test_a_budget_for_all_holds_the_blocks_and_no_embedding() -> None:
    (rank,) = make_plan(CONFIG, Settings(cpu_offload=100 * GIB)).ranks
    embedding_and_head, last_norm = 2 * 2 * 128256 * 4096, 2 * 4096
    assert rank.bf16_weights - rank.bf16_host == embedding_and_head + last_norm


def test_the_command_shows_it_and_refuses_other_numbers(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["plan", CONFIG, "--gpu-memory", "24GiB"]
    assert main([*command, "--cpu-offload-gb", "2.5", "--png", str(tmp_path / "plan.png")]) == 0
    assert "  in host memory " in capsys.readouterr().out
    assert main([*command, "--cpu-offload-gb", "2.5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cpu_offload"] == 2.5 * GIB
    assert 0 < found["stages"][0]["dfloat11_host"] <= found["cpu_offload"]
    assert main(command) == 0
    assert "host memory" not in capsys.readouterr().out
    for wrong in ("-1", "nan", "inf"):
        assert main([*command, "--cpu-offload-gb", wrong]) == 2
        assert "--cpu-offload-gb" in capsys.readouterr().err
