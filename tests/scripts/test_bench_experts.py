"""The measurement of a mixture's experts, rehearsed in Triton's interpreter; a plain product stands for vLLM's."""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_dfloat.device import experts
from vllm_dfloat.kernels import configs

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make scripts importable, and undo the settings that they make for their process."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setenv("VLLM_DFLOAT_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    small = replace(configs.INTERPRETED, decode_tiles_per_program=4, chosen_programs=8)
    with configs.override(small):  # the interpreter computes all tiles of a program
        yield
    for name in list(sys.modules):
        if name.startswith(("bench_", "bench.", "tune_")) or name == "bench":
            del sys.modules[name]


def plain(
    x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, parts: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """Multiply as vLLM's kernel does, in plain PyTorch."""
    out = torch.zeros_like(x)
    for token, (chosen, part) in enumerate(zip(ids.tolist(), parts, strict=True)):
        for expert, weight in zip(chosen, part, strict=True):
            gate, up = (w13[expert] @ x[token]).chunk(2)
            out[token] += weight * (w2[expert] @ (torch.nn.functional.silu(gate) * up))
    return out


def reading_all(x: Any, w13: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """As `plain`, by a kernel that reads an expert without tokens."""
    return plain(x, w13, *arguments) + 0 * w13.sum()


def measure(path: Path, monkeypatch: pytest.MonkeyPatch, product: Any = None) -> dict[str, Any]:
    import bench_kernels
    from bench.kernels import experts as section

    if product is not None:
        monkeypatch.setattr(section, "fused_experts", lambda device: product)
    arguments = ["--device", "cpu", "--only", "experts", "--output", str(path)]
    status = bench_kernels.main(arguments)
    found = json.loads(path.read_text())
    assert status == bool(found["environment"]["wrong_bits"])
    return found


@pytest.mark.on_demand
def test_chosen_experts_are_measured_beside_all_and_a_missing_peer_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = measure(tmp_path / "found.json", monkeypatch)
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["vLLM's product with BF16 experts"]["not_measured"] == "needs a GPU"
    for ending in ("", ", fast layout"):
        assert rows[f"chosen experts{ending}"]["experts"] == 1
        assert rows[f"all experts{ending}"]["experts"] == 4
    assert all("wrong_bits" not in row for row in found["rows"])


def test_a_product_on_decoded_experts_is_compared_with_that_on_bf16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = measure(tmp_path / "found.json", monkeypatch, plain)
    names = [row["name"] for row in found["rows"] if "us" in row]
    assert names == [
        "all experts",
        "chosen experts",
        "all experts, fast layout",
        "chosen experts, fast layout",
        "vLLM's product with BF16 experts",
        "chosen experts, then the product",
        "chosen experts, fast layout, then the product",
    ]


def test_a_kernel_that_reads_experts_without_tokens_marks_the_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = measure(tmp_path / "found.json", monkeypatch, reading_all)
    sentences = found["environment"]["wrong_bits"]
    assert len(sentences) == 2  # packed, and in the fast layout
    assert all(sentence.startswith("product, tiny, 1 token: ") for sentence in sentences)
    assert all(row["wrong_bits"] == "; ".join(sentences) for row in found["rows"])


@pytest.mark.on_demand
def test_tiles_decoded_in_vain_mark_the_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_marked(ids: torch.Tensor, expert_map: Any, chosen: torch.Tensor) -> None:
        chosen.fill_(1)

    monkeypatch.setattr(experts, "mark_chosen", all_marked)
    found = measure(tmp_path / "found.json", monkeypatch)
    assert found["environment"]["wrong_bits"] == [
        "chosen experts, tiny, 1 token: 8 tiles decoded; expected 2",
        "chosen experts, fast layout, tiny, 1 token: 2 tiles decoded; expected 1",
    ]


@pytest.mark.parametrize("num_tokens", [1, 16])
def test_a_token_takes_no_expert_twice_and_single_tokens_take_turns(
    num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.kernels import experts as section
    from bench.kernels.timing import Bench

    shape = section.LAYERS["Qwen3-30B-A3B"]
    sets = section.choices(Bench(CPU, 1, 0), shape, num_tokens, 16)
    assert [each.shape for each in sets] == [(num_tokens, 8)] * 16
    assert all(len(token.unique()) == 8 for each in sets for token in each)
    if num_tokens == 1:
        assert torch.cat(sets).unique().tolist() == list(range(128))


def test_the_cases_for_tuning_decode_single_choices_and_many_in_both_layouts() -> None:
    from bench.kernels import tune_cases
    from bench.kernels.timing import Bench

    cases = tune_cases.cases_for(Bench(CPU, 1, time.monotonic() + 60), "chosen_programs")
    assert [case.name.split(", ")[1] for case in cases] == ["packed", "fast"]
    for case in cases:
        case.check()
        case.call(0)
