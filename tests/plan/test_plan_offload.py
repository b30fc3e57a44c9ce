"""--cpu-offload-gb in a plan: what it takes off the GPU, in the table, in JSON and in the picture."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_dfloat.cli import main
from vllm_dfloat.plan.offload import (
    BlockWeight,
    OnHost,
    Prefetch,
    bf16_on_host,
    dfloat11_on_host,
    on_host,
)
from vllm_dfloat.plan.picture import _bars
from vllm_dfloat.plan.plan import make_plan
from vllm_dfloat.plan.settings import Settings

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


def block(turn: int, layer: int) -> list[BlockWeight]:
    """Return the weights of a block whose layer takes so many bytes compressed."""
    return [
        BlockWeight(1000, layer, True, False, "mlp.down_proj", turn),
        BlockWeight(400, 300, True, False, "mlp.experts.w2_weight", turn),
        BlockWeight(200, 200, False, False, "mlp.gate", turn),
        BlockWeight(10, 10, False, True, "input_layernorm", turn),
    ]


BLOCKS = [
    *(weight for turn, size in enumerate((640, 660, 650, 512)) for weight in block(turn, size)),
    BlockWeight(1000, 660, True, False, "mlp.down_proj", -1),  # of a tower
]


@pytest.mark.parametrize(
    ("prefetch", "expected"),
    [
        (Prefetch(), OnHost(0, 0)),
        (Prefetch(4), OnHost(1610, 812, 1610, 512 + 2 + 300 + 1)),
        (Prefetch(2), OnHost(2 * 1610, 660 + 512 + 600, 1610, 660 + 2 + 300 + 1)),
        (Prefetch(4, 2, 2), OnHost(2 * 1610, 650 + 512 + 600, 2 * 1610, 2 * (650 + 2 + 300 + 1))),
        (Prefetch(1, params=frozenset({"experts"})), OnHost(1600, 1200, 400, 301)),
        (Prefetch(1, params=frozenset({"mlp.down_proj.weight"})), OnHost(4000, 2462, 1000, 662)),
        (Prefetch(1, params=frozenset({"down", "layers"})), OnHost(0, 0)),
    ],
)
def test_prefetching_offload_takes_the_last_blocks_of_each_group(
    prefetch: Prefetch, expected: OnHost
) -> None:
    assert on_host(BLOCKS, 10**6 if prefetch.group_size else 0, prefetch) == expected


def test_prefetching_offload_leaves_room_for_the_kv_cache_but_for_its_buffers(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    settings = Settings(gpu_memory=24 * GIB, pp=2)
    given = make_plan(CONFIG, replace(settings, prefetch=Prefetch(8, 2)))
    without = make_plan(CONFIG, settings)
    for index, (rank, before) in enumerate(zip(given.ranks, without.ranks, strict=True)):
        blocks = 4 * (4096 * (6144 + 4096 + 3 * 14336) * 2 + 2 * 2 * 4096)
        assert rank.bf16_host == blocks  # 16 blocks on each stage, 2 groups
        assert rank.bf16_buffers == blocks / 4
        assert 0.65 * blocks < rank.dfloat11_host < 0.7 * blocks
        assert rank.dfloat11_buffers == pytest.approx(rank.dfloat11_host / 4, rel=0.01)
        gained = rank.dfloat11_host - rank.dfloat11_buffers
        assert given.dfloat11.kv_bytes[index] == without.dfloat11.kv_bytes[index] + gained
        assert before.dfloat11_buffers == before.dfloat11_host == 0
    plain, packed, *_ = _bars(given)
    assert packed.parts["weights"] == given.ranks[0].dfloat11_on_gpu
    assert plain.name.endswith("in host memory")
    command = ["plan", CONFIG, "--gpu-memory", "24GiB"]
    asked = ["--offload-group-size", "8", "--offload-num-in-group", "2", "--offload-params", "mlp"]
    assert main([*command, *asked, "--png", str(tmp_path / "plan.png")]) == 0
    told = capsys.readouterr().out
    assert "--offload-group-size" in told
    assert "\nbuffers " in told
    assert main([*command, *asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["offload_num_in_group"], found["offload_params"]) == (2, ["mlp"])
    assert found["stages"][0]["dfloat11_buffers"] > 0
    for wrong in (
        "--offload-group-size=-1",
        "--offload-prefetch-step=0",
        "--offload-num-in-group=9",
    ):
        assert main([*command, "--offload-group-size", "8", wrong]) == 2
        assert wrong.partition("=")[0] in capsys.readouterr().err


def test_buffers_larger_than_two_layers_are_the_peak_while_loading(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Bug caught: "bound: two layers on top" of 3.5 GiB where 27 GiB of buffers are allocated after the last layer.
    (many,) = make_plan(CONFIG, Settings(prefetch=Prefetch(group_size=1, step=99))).ranks
    assert many.loading_peak == many.dfloat11_on_gpu + many.scratch
    (few,) = make_plan(CONFIG, Settings(prefetch=Prefetch(group_size=1))).ranks
    assert few.loading_peak > few.dfloat11_on_gpu + few.scratch
    options = ["--gpu-memory", "24GiB", "--offload-group-size", "1", "--offload-prefetch-step"]
    assert main(["plan", CONFIG, *options, "99"]) == 1  # does not fit
    assert "bound: the buffers on top\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            "--offload-params experts mlp",
            "--offload-params experts mlp without --offload-group-size: it needs groups. Give --offload-group-size, "
            "or leave --offload-params out.",
        ),
        ("--offload-num-in-group 2", "--offload-num-in-group 2 without --offload-group-size"),
        ("--offload-prefetch-step 3", "--offload-prefetch-step 3 without --offload-group-size"),
        (
            "--offload-group-size 2 --cpu-offload-gb 1",
            "--cpu-offload-gb 1 with --offload-group-size 2: vLLM then leaves --cpu-offload-gb aside; expected one of "
            "them. Remove the other.",
        ),
    ],
)
def test_options_of_offload_that_would_change_nothing_are_refused(
    options: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # Bug caught: the plan without them, and no word of that.
    assert main(["plan", CONFIG, "--gpu-memory", "24GiB", *options.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"vllm-dfloat: {sentence}")


@pytest.mark.parametrize(
    ("options", "note"),
    [
        (
            "--offload-group-size 100",
            "--offload-group-size 100 puts nothing into host memory: it begins with block 100 of a group, and a stage "
            "has 32 blocks.",
        ),
        (
            "--offload-group-size 4 --offload-params experts",
            "--offload-group-size 4 puts nothing into host memory: no weight of the blocks it takes has a segment of "
            "--offload-params (experts).",
        ),
        (
            "--enable-expert-parallel",
            "--enable-expert-parallel changes nothing: the model has no routed experts.",
        ),
    ],
)
def test_options_that_change_nothing_for_this_model_have_a_note(
    options: str, note: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", CONFIG, "--gpu-memory", "24GiB"]
    assert main([*command, *options.split()]) == 0
    assert note in capsys.readouterr().out.splitlines()
    assert main([*command, "--offload-group-size", "32", "--offload-params", "mlp"]) == 0
    assert "nothing" not in capsys.readouterr().out


def test_expert_parallel_ranks_of_a_mixture_have_no_note() -> None:
    config = str(Path(CONFIG).with_name("Qwen3-30B-A3B.json"))
    plan = make_plan(config, Settings(tp=2, expert_parallel=True))
    assert not any("nothing" in note for note in plan.notes)
