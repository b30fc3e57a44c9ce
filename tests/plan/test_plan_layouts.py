"""The plan's sizes in each layout are those of the encoders; `--layout all` shows them side by side."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import gaussian, to_torch

from vllm_dfloat.cli import main
from vllm_dfloat.device import fast_ops, ops, unit_resident
from vllm_dfloat.plan.layout_sizes import LAYOUTS, Codes, share_of_escapes, size_of
from vllm_dfloat.plan.packed_size import mean_code_bits
from vllm_dfloat.plan.plan import Plan, fast_layers, make_plan
from vllm_dfloat.plan.settings import Settings
from vllm_dfloat.plan.weights import Part, Weight

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
PACK: dict[str, Callable[[torch.Tensor], ops.PackedWeight | None]] = {
    "packed": ops.pack,
    "fast": fast_ops.pack,
    "dfloat11": unit_resident.pack,
}


def spread(rows: int, cols: int) -> np.ndarray:
    """Return weights of 50 exponents, of which the fast layout would hold every tile raw."""
    rng = np.random.default_rng(3)
    return (rng.integers(67, 117, (rows, cols)) << 7 | rng.integers(0, 128, (rows, cols))).astype(
        np.uint16
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "bits", [gaussian(256, 256), gaussian(1000, 700), gaussian(64, 3), spread(128, 256)]
)
def test_planned_size_is_that_of_the_encoder(layout: str, bits: np.ndarray) -> None:
    counts = np.bincount(bits.reshape(-1) >> 7 & 0xFF, minlength=256)
    codes = Codes(lambda _: mean_code_bits(counts), lambda _: share_of_escapes(counts))
    weight = Weight("w", (Part(bits.shape[0]),), bits.shape[1], is_compressed=True)
    planned = size_of(layout, weight, *bits.shape, codes)
    held = PACK[layout](to_torch(bits)) or ops.pack(to_torch(bits))
    assert planned.is_raw == held.is_raw
    assert planned.num_bytes == pytest.approx(held.num_bytes, rel=0.005, abs=2048)


def test_layouts_stand_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", str(CONFIGS / "Llama-3.1-8B.json"), "--gpu-memory", "24GiB", "--layout"]
    single, shown = {}, (*LAYOUTS, "auto")
    tokens = ["--kv-tokens", "75000"]
    for layout in shown:
        assert main([*command, layout, "--json", *(tokens if layout == "auto" else [])]) == 0
        single[layout] = json.loads(capsys.readouterr().out)
        assert single[layout]["layout"] == layout
    assert main([*command, "all", "--json", *tokens]) == 0
    assert json.loads(capsys.readouterr().out) == single
    assert main([*command, "all", *tokens]) == 0
    table, below = capsys.readouterr().out.split("\n\n")
    assert below.startswith("codes: 2.7 bits per exponent, assumed")
    assert f"\n{single['auto']['notes'][-1]}.\n" in below
    assert "Llama-3.1-8B.json, layout packed: the model fits in both; " in below
    head, bf16, *rows = table.splitlines()
    assert head.split() == ["layout", "weights", "bits", "scratch", "for", "KV", "KV", "tokens"]
    assert bf16.split()[0] == "BF16"
    assert [row.split()[0] for row in rows] == list(shown)
    for layout, row in zip(shown, rows, strict=True):
        assert row.split()[-1] == f"{single[layout]['dfloat11']['kv_tokens']:,}"
    bits = [single[layout]["stages"][0]["bits_per_weight"] for layout in LAYOUTS]
    assert bits == pytest.approx([10.81, 12.01, 10.92], abs=0.01)
    assert 75_000 <= single["auto"]["dfloat11"]["kv_tokens"] < 75_100


def test_without_a_number_auto_stands_beside_the_others_with_room_for_one_request(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["plan", str(CONFIGS / "Llama-3.1-8B.json"), "--gpu-memory", "24GiB"]
    for length, told in ((["--max-model-len", "72000"], "72,000"), ([], "131,072")):
        assert main([*command, "--layout", "all", *length]) == 0
        *_, choice, _ = capsys.readouterr().out.splitlines()
        assert choice.startswith("auto: ")
        assert f"{told} tokens of KV cache" in choice


@pytest.mark.parametrize("layout", ["dfloat11", "all"])
def test_the_official_layout_has_no_groups(layout: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(CONFIGS / "Llama-3.1-8B.json")
    options = ["--gpu-memory", "24GiB", "--layout", layout, "--granularity", "block"]
    assert main(["plan", model, *options]) == 2
    assert f"--granularity block with --layout {layout}: weights" in capsys.readouterr().err


def test_a_group_needs_the_same_scratch_in_every_layout_that_has_groups() -> None:
    found = {
        layout: make_plan(
            str(CONFIGS / "Llama-3.1-8B.json"),
            Settings(gpu_memory=24 << 30, layout=layout, granularity="block"),
        )
        for layout in ("packed", "fast", "auto")
    }
    block = 4096 * (6144 + 4096 + 3 * 14336)
    assert {plan.ranks[0].scratch for plan in found.values()} == {2 * block + 4 * block // 2048}


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
            "--kv-tokens 100 with --layout packed: it needs --layout auto or all. Give",
        ),
        ([], "--kv-tokens 100 with --layout packed: it needs --layout auto or all. Give"),
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


def test_a_slab_may_be_given_in_bytes_or_as_a_size(capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for slab in ("67108864", "64MiB"):
        model = str(CONFIGS / "Llama-3.1-8B.json")
        assert main(["plan", model, "--gpu-memory", "24GiB", "--slab", slab]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


def test_a_slab_of_nothing_is_refused_as_the_option_is(capsys: pytest.CaptureFixture[str]) -> None:
    # Bug caught: it was the plan of --slab off, and an engine refuses it.
    model = str(CONFIGS / "Llama-3.1-8B.json")
    assert main(["plan", model, "--gpu-memory", "24GiB", "--slab", "0"]) == 2
    assert "--slab 0: expected auto, off, a positive number" in capsys.readouterr().err
