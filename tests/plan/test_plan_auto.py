"""Layout "auto" in a plan: what it holds fast, in which order, and what it is asked with."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_dfloat.cli import main
from vllm_dfloat.plan.auto import Candidate, layer_of, layers_of, turn_of
from vllm_dfloat.plan.plan import Plan, fast_layers, make_plan
from vllm_dfloat.plan.settings import MODES, Settings
from vllm_dfloat.plan.weights import Part, Weight

CONFIGS = Path(__file__).parents[1] / "data" / "configs"


def auto(kv_tokens: int, **others: object) -> Plan:
    settings = dict(gpu_memory=24 << 30, max_model_len=8192, layout="auto", kv_tokens=kv_tokens)
    return make_plan(str(CONFIGS / "Llama-3.1-8B.json"), Settings(**{**settings, **others}))


@pytest.mark.parametrize("tokens", [70_000, 73_000, 78_000])
def test_auto_leaves_the_tokens_that_were_asked_for_and_little_more(tokens: int) -> None:
    plan = auto(tokens)
    assert tokens <= plan.dfloat11.tokens
    # One more matrix in the fast layout, the smallest that is left, would take the rest.
    smallest = 4096 * 4096 * 1.2 / 8 / 131_072
    assert plan.dfloat11.tokens < tokens + smallest + 32 or len(plan.ranks[0].fast) >= 128
    assert 0 < len(plan.ranks[0].fast) < 130


def test_auto_takes_blocks_before_the_head_and_never_an_embedding() -> None:
    (all_of_them,) = (rank.fast for rank in auto(1).ranks)
    assert "lm_head" in all_of_them
    assert "model.embed_tokens" not in all_of_them
    (some,) = (rank.fast for rank in auto(71_000).ranks)
    assert all_of_them - some == {"lm_head"}
    tied = make_plan(str(CONFIGS / "gemma-3-1b-it.json"), Settings(layout="auto", kv_tokens=1))
    assert "model.embed_tokens" in tied.ranks[0].fast  # it is the head


def of_experts(kv_tokens: int, layout: str = "auto") -> Plan:
    tokens = kv_tokens if layout == "auto" else None
    settings = Settings(gpu_memory=64 << 30, max_model_len=8192, layout=layout, kv_tokens=tokens)
    return make_plan(str(CONFIGS / "Qwen3-30B-A3B.json"), settings)


def test_routed_experts_are_fast_if_asked_for_and_with_auto_after_all_other_layers() -> None:
    (packed,), (fast,) = (of_experts(1, layout).ranks for layout in ("packed", "fast"))
    assert packed.bits_per_weight == pytest.approx(10.8, abs=0.05)
    assert fast.bits_per_weight == pytest.approx(12.01, abs=0.01)
    assert fast.scratch == packed.scratch
    (all_of_them,) = (rank.fast for rank in of_experts(1).ranks)
    experts = {f"model.layers.{layer}.mlp.experts" for layer in range(48)}
    others = {f"model.layers.{i}.self_attn.{n}_proj" for i in range(48) for n in ("qkv", "o")}
    assert all_of_them == experts | others | {"lm_head"}
    half = of_experts(160_000)
    (some,) = (rank.fast for rank in half.ranks)
    assert others < some
    assert 0 < len(experts & some) < 48
    assert half.dfloat11.tokens >= 160_000
    assert (
        f"auto: {len(some) + len(experts & some)} of {2 * 48 + len(others) + 2} matrices fast"
        in half.notes[-1]
    )


@pytest.fixture
def uneven(tmp_path: Path) -> str:
    """Return a model of the size of Llama 3.1 8B, of whose matrices down_proj has columns in no multiple of 128."""
    config = json.loads((CONFIGS / "Llama-3.1-8B.json").read_text())
    (tmp_path / "uneven.json").write_text(json.dumps({**config, "intermediate_size": 14400}))
    return str(tmp_path / "uneven.json")


@pytest.mark.parametrize("mode", MODES)
def test_matrices_that_are_decoded_in_every_mode_are_the_last_that_auto_holds_fast(
    mode: str, uneven: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # Bug caught: modes that multiply without decoding got no more from the memory than mode "exact".
    settings = Settings(gpu_memory=24 << 30, max_model_len=8192, layout="auto", mode=mode)
    fast, told, _ = fast_layers(uneven, replace(settings, kv_tokens=72_000))
    decoded = sum(name.endswith("down_proj") for name in fast)
    assert (decoded, len(fast)) == ((28, 112) if mode == "exact" else (8, 105))
    assert ("lm_head" in fast) == (mode != "exact")
    assert len(fast_layers(uneven, replace(settings, kv_tokens=1))[0]) == 129
    command = ["plan", uneven, "--gpu-memory", "24GiB", "--max-model-len", "8192", "--mode", mode]
    for layout in ("auto", "all"):
        assert main([*command, "--kv-tokens", "72000", "--layout", layout]) == 0
        assert told in capsys.readouterr().out


@pytest.mark.parametrize(
    ("width", "hidden", "turns"),
    [(768, 2048, (2, 2)), (704, 2048, (2, 5)), (768, 2000, (5, 2)), (704, 2000, (5, 5))],
)
def test_an_expert_has_its_columns_in_one_tensor_and_its_rows_in_the_other(
    width: int, hidden: int, turns: tuple[int, int]
) -> None:
    tensors = [
        Weight(
            f"model.layers.0.mlp.experts.{name}", (Part(width),) * parts, 8 * hidden, "rows",
            layer=0, is_compressed=True, num_experts=8,
        )
        for name, parts in (("w13_weight", 2), ("w2_weight", 1))
    ]  # fmt: skip
    for expert_parallel in (False, True):
        shapes = [one.shape_of_rank(1, expert_parallel) for one in tensors]
        found = [turn_of(*one, decodes_all=False) for one in zip(tensors, shapes, strict=True)]
        assert tuple(found) == turns
    both = [Candidate(layer_of(one), turn, 7) for one, turn in zip(tensors, turns, strict=True)]
    assert layers_of(both) == [Candidate("model.layers.0.mlp.experts", min(turns), 14)]


def test_auto_chooses_for_each_stage_and_says_so_where_nothing_has_room() -> None:
    first, second = (rank.fast for rank in auto(1, pp=2).ranks)
    assert {name.split(".")[2] for name in first} == {str(layer) for layer in range(16)}
    assert first.isdisjoint(second)
    plan = auto(100_000)
    assert plan.ranks[0].fast == frozenset()
    told, short = plan.notes[-2:]
    assert "since with any of them fast there would be no room for 100,000 tokens" in told
    assert fast_layers(plan.model, plan.settings) == (frozenset(), told, [short])
    assert (
        fast_layers(plan.model, replace(plan.settings, kv_tokens=73_000))[0]
        == auto(73_000).ranks[0].fast
    )


def test_tokens_for_which_packed_matrices_leave_no_room_either_are_told() -> None:
    # Bug caught: nothing was said of a wish that cannot be fulfilled, and vLLM started with fewer tokens.
    plan = auto(1_000_000)
    room = f"there is room for about {plan.dfloat11.tokens:,} tokens of KV cache."
    assert f"kv_tokens 1,000,000: even with all matrices packed {room}" in plan.notes[-1]
    assert fast_layers(plan.model, plan.settings)[2] == [plan.notes[-1]]
    assert auto(plan.dfloat11.tokens).notes[-1].startswith("auto: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--layout", "packed"],
            "--kv-tokens 100 with --layout packed: it changes what layout auto",
        ),
        ([], "--kv-tokens 100 with --layout packed: it changes what layout auto"),
        *(
            (
                ["--layout", layout, "--kv-cache-memory", "1GiB"],
                "--kv-tokens 100 with --kv-cache-memory 1GiB: each says how large the KV cache is;",
            )
            for layout in ("auto", "all")
        ),
        (["--layout", "all", "--granularity", "block"], "--granularity block with --layout all:"),
    ],
)
def test_tokens_that_nothing_is_chosen_by_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # Bug caught: the number was ignored; serving refuses the same pair.
    model = str(CONFIGS / "Llama-3.1-8B.json")
    assert main(["plan", model, "--gpu-memory", "24GiB", "--kv-tokens", "100", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_mode_that_nothing_is_chosen_by_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", str(CONFIGS / "Llama-3.1-8B.json"), "--gpu-memory", "24GiB"]
    assert main([*command, "--layout", "fast", "--mode", "fused"]) == 2
    line = capsys.readouterr().err
    assert (
        "--mode fused with --layout fast: it changes what layout auto chooses, and nothing" in line
    )
    assert line.endswith("Give one of these, or leave --mode out.\n")


def test_a_model_that_leaves_no_room_at_all_is_not_helped_by_fewer_tokens() -> None:
    plan = auto(10, gpu_memory=11 << 30, max_model_len=None)
    assert plan.choice[-1] == (
        "kv_tokens 10: even with all matrices packed there is no room for KV cache. Use more or larger GPUs"
    )
