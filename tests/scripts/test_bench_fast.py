"""The measurements of the fast layout, and its tuning, rehearsed in Triton's interpreter."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_dfloat.device import fast_ops
from vllm_dfloat.integration.layers import layouts

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make scripts importable, and undo the settings that they make for their process."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setenv("VLLM_DFLOAT_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    yield
    for name in list(sys.modules):
        if name.startswith(("bench_", "bench.", "tune_", "sanitize_")) or name == "bench":
            del sys.modules[name]


def measured(path: Path) -> dict[str, Any]:
    import bench_kernels

    arguments = ["--device", "cpu", "--only", "runs", "--output", str(path)]
    status = bench_kernels.main(arguments)
    found = json.loads(path.read_text())
    assert status == bool(found["environment"]["wrong_bits"])
    return found


def test_runs_of_rows_are_measured_in_both_layouts_beside_the_whole_and_a_copy(
    tmp_path: Path,
) -> None:
    rows = measured(tmp_path / "found.json")["rows"]
    assert [row["name"] for row in rows] == [
        "copy of the bytes read and written",
        "whole",
        "2 runs of 128 rows",
        "whole, fast layout",
        "2 runs of 128 rows, fast layout",
    ]
    assert all(row["us"] > 0 for row in rows)
    assert rows[1]["bits_per_weight"] < rows[3]["bits_per_weight"] < 13


def test_a_wrong_weight_in_a_later_run_marks_the_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(desc: Any, rows: int, cols: int, first: int, count: int, *buffers: Any) -> None:
        fast_ops.launch_decode_run(desc, rows, cols, first, count, *buffers)
        if first:
            buffers[0].view(torch.int16)[3] ^= 1

    changed = {
        **layouts.BY_NAME,
        "fast": replace(layouts.BY_NAME["fast"], decode_run=spoiled),
    }
    monkeypatch.setattr(layouts, "BY_NAME", changed)
    found = measured(tmp_path / "found.json")
    (sentence,) = found["environment"]["wrong_bits"]
    assert sentence.startswith("256 x 208, 2 runs of 128 rows, fast layout, row 128: 1 of ")


@pytest.mark.parametrize("name", ["fast_held", "fast_run", "fast_chosen", "fast_group"])
def test_plain_form_of_a_decoder_is_checked_beside_the_one_with_prmt(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Bug caught: only the form that a GPU takes by itself is checked there.
    from bench.checks import fast
    from bench.kernels.timing import WrongBitsError

    from vllm_dfloat.kernels import fast_decode, fast_experts, fast_group, fast_rows

    def is_spoiled(kernel: Any) -> Any:
        def decode(*arguments: Any, prmt: bool | None = None) -> None:
            kernel(*arguments, prmt=prmt)
            if prmt is not None:
                tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
                (out,) = [tensor for tensor in tensors if tensor.dtype == torch.bfloat16]
                out.view(torch.int16).add_(1)

        return decode

    monkeypatch.setattr(fast, "_has_prmt", lambda device: True)
    getattr(fast, name)(torch.device("cpu"))
    places = {"fast_held": (fast_rows, "decode_rows"), "fast_run": (fast_decode, "decode_run")}
    places |= {"fast_chosen": (fast_experts, "decode_chosen")}
    module, kernel = places.get(name, (fast_group, "decode_group"))
    monkeypatch.setattr(module, kernel, is_spoiled(getattr(module, kernel)))
    with pytest.raises(WrongBitsError, match=", plain"):
        getattr(fast, name)(torch.device("cpu"))


def test_tuning_tries_a_parameter_of_the_fast_layout_on_all_that_it_is_used_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    import tune_kernels

    assert tune_kernels.main(["--device", "cpu", "--only", "fast_weights_at_once"]) == 0
    lines = capsys.readouterr().out.splitlines()
    cases = {line.split("  ")[1].strip() for line in lines if line.startswith("fast_weights")}
    assert len(cases) == 3
    assert "LaunchConfig(" in lines[-1]


def test_rows_at_once_that_do_not_divide_those_of_a_program_are_not_tried(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Bug caught: a candidate that cannot be right ends the tuning with "wrong bits".
    import tune_kernels
    from bench.kernels.timing import Bench

    from vllm_dfloat.kernels.configs import LaunchConfig

    bench = Bench(torch.device("cpu"), 1, 0)
    config = LaunchConfig(fast_rows_per_program=8, fast_rows_at_once=4)
    tune_kernels.best_of(bench, "fast_rows_at_once", [_nothing(bench)], config)
    assert [row["name"] for row in bench.rows] == ["4", "2", "8"]


def _nothing(bench: Any) -> Any:
    from bench.kernels.tune_cases import Case

    return Case("nothing", lambda i: None, lambda: None, 1)
