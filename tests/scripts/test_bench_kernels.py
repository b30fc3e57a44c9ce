"""The scripts that measure and tune kernels, rehearsed in Triton's interpreter; wrong bits must mark the times."""

import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_dfloat.device import ops
from vllm_dfloat.kernels.configs import INTERPRETED, config_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make scripts importable, and undo the settings that they make for their process."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setenv("VLLM_DFLOAT_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def test_rehearsal_measures_decode_beside_a_copy_and_says_what_its_times_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import bench_kernels

    path = tmp_path / "new" / "kernels.json"
    arguments = ["--device", "cpu", "--only", "decode", "--output", str(path)]
    assert bench_kernels.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "interpreter" in printed.splitlines()[0]
    found = json.loads(path.read_text())
    names = {row["name"]: row for row in found["rows"]}
    assert names["pinned host to device"]["not_measured"] == "needs a GPU"
    decode = names["decode"]
    assert decode["us"] > 0
    assert decode["of_copy"] == pytest.approx(1 / decode["ratio"], rel=1e-2)
    assert decode["bits_per_weight"] > 8
    assert set(found["environment"]) >= {"driver", "torch", "triton", "date", "command", "commit"}
    assert list(path.parent.iterdir()) == [path]


def spoiled(*arguments: Any) -> None:
    """Decode, and flip the lowest bit of one weight."""
    REAL_DECODE(*arguments)
    arguments[3].view(torch.int16)[7] ^= 1


REAL_DECODE = ops.decode


@pytest.mark.parametrize("section", ["decode", "encode"])
def test_wrong_bits_mark_the_times_of_their_case_and_end_with_status_1(
    section: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import bench_kernels

    monkeypatch.setattr(ops, "decode", spoiled)
    path = tmp_path / "kernels.json"
    arguments = ["--device", "cpu", "--only", section, "decode_rows", "--output", str(path)]
    assert bench_kernels.main(arguments) == 1
    printed = capsys.readouterr()
    sentence = " weights differ from the original ones"
    assert sentence in printed.err
    found = json.loads(path.read_text())
    assert len(found["environment"]["wrong_bits"]) == 1
    measured = {row["section"]: row for row in found["rows"] if "us" in row}
    assert sentence in measured[section]["wrong_bits"]
    assert "wrong_bits" not in measured["decode_rows"]  # the mark ends with its case
    assert any("WRONG BITS" in line and sentence in line for line in printed.out.splitlines())


def test_each_row_is_printed_and_in_the_file_before_the_next_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Bug caught: a run that was ended early left no rows, because all were printed at the end.
    import bench_kernels
    from bench.kernels import decode as bench_decode

    path = tmp_path / "kernels.json"
    seen: list[Any] = []

    def look(bench: Any) -> None:
        seen.append((capsys.readouterr().out, json.loads(path.read_text())["rows"]))

    monkeypatch.setattr(bench_decode, "run_encode", look)
    arguments = ["--device", "cpu", "--only", "decode", "encode", "--output", str(path)]
    assert bench_kernels.main(arguments) == 0
    ((printed, rows),) = seen
    assert [row["name"] for row in rows if "us" in row] == [
        "copy of the bytes read and written",
        "decode",
    ]
    assert all(row["name"] in printed for row in rows)


def test_part_that_fails_costs_its_own_numbers_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import bench_kernels
    from bench.kernels import groups as bench_groups

    def fail(bench: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(bench_groups, "run", fail)
    assert bench_kernels.main(["--device", "cpu", "--only", "block", "decode"]) == 1
    printed = capsys.readouterr()
    assert "failed: block: RuntimeError: out of memory" in printed.err
    assert "copy of the bytes read and written" in printed.out


def test_a_section_takes_its_share_of_the_time_and_leaves_the_rest_to_later_ones() -> None:
    # Bug caught: a slow section after which nothing else was measured.
    import bench_kernels
    from bench.kernels import decode as bench_decode
    from bench.kernels import fast_decode, fast_fused
    from bench.kernels.timing import Bench

    left: dict[str, float] = {}
    with pytest.MonkeyPatch.context() as patch:
        for module, name in (
            (bench_decode, "decode"),
            (fast_decode, "fast"),
            (fast_fused, "fast_fused"),
        ):
            patch.setattr(
                module, "run", lambda bench, name=name: left.update({name: bench.deadline - begun})
            )
        begun = time.monotonic()
        bench = Bench(torch.device("cpu"), 1, begun + 700)
        assert bench_kernels.measure(bench, ["decode", "fast", "fast_fused"]) == []
    assert left["decode"] == pytest.approx(200, abs=1)
    assert left["fast"] == pytest.approx(140, abs=1)  # of 700 s that nobody has used
    assert left["fast_fused"] == pytest.approx(700, abs=1)


def test_three_sizes_are_measured_first_and_the_others_by_another_call() -> None:
    from bench.kernels.timing import Bench

    found = []
    for sizes in ("first", "rest", "all"):
        bench = Bench(torch.device("cpu"), 1, 0, sizes=sizes)
        found.append(list(bench.of_sizes([], [5, 4, 3, 2, 1])))
    assert found == [[5, 4, 3], [2, 1], [5, 4, 3, 2, 1]]


def test_few_products_are_compared_per_case_so_that_a_visit_reaches_all_of_them() -> None:
    # Bug caught: 150 kernels to compile, and 4 of 28 cases reached.
    from bench.kernels import fast_fused

    assert {1, 4, 8, 16, 64} <= set(fast_fused.TRIED)
    assert list(fast_fused.TRIED)[:2] == [8, 16]
    compiled = fast_fused._kernels()
    assert len(compiled) <= 42
    for num_x, shapes in fast_fused.TRIED.items():
        for rows, cols in (*fast_fused.LLAMA_8B.values(), *fast_fused.QWEN3_32B.values()):
            tried = fast_fused.tried(rows, cols, num_x)
            assert bool(shapes) <= len(tried) <= 6
            assert {fast_fused._key(kernel) for kernel in tried} <= set(compiled)


def test_forms_are_compared_before_anything_is_timed_and_slow_ones_do_not_delay_the_cases(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Bug caught: PTX and Triton alone compared last, when the time of a visit is over.
    from bench.kernels import fast_fused
    from bench.kernels.timing import Bench

    forms = fast_fused._forms()
    assert {fast_fused.NAMES[kernel.form] for kernel in forms} == {"plain", "patched"}
    twins = [kernel._replace(form=fast_fused.PERMUTED) for kernel in forms]
    compiled: dict[Any, Future[None]] = {kernel: Future() for kernel in fast_fused._kernels()}
    assert set(list(compiled)[: len({*forms, *twins})]) == {*forms, *twins}
    slow = forms[3]
    for kernel, future in compiled.items():
        if kernel != slow:
            future.set_result(None)
    events: list[Any] = []
    replaced = {
        "_compare_form": lambda bench, kernel, *rest: events.append(kernel),
        "_check": lambda *arguments: True,
        "_sets": lambda *arguments: ([], []),
        "_measure": lambda *arguments: events.append("timed"),
    }
    for name, function in replaced.items():
        monkeypatch.setattr(fast_fused, name, function)
    monkeypatch.setattr(fast_fused, "FORMS_PATIENCE", 0.1)
    fast_fused._run(Bench(torch.device("cpu"), 1, time.monotonic() + 600), compiled)
    first = events.index("timed")
    assert events[:first] == [kernel for kernel in forms if kernel != slow]
    assert set(events[first:-1]) == {"timed"}
    assert events[-1] == slow


@pytest.mark.parametrize("is_equal", [True, False])
def test_a_form_with_other_bits_is_told_and_ends_the_measurement_with_status_1(
    is_equal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.kernels import fast_fused
    from bench.kernels.timing import Bench

    kernel = fast_fused.Kernel(fast_fused.GemvShape(), fast_fused.PLAIN, 1)
    product = fast_fused._product

    def plain(x: torch.Tensor, matrix: Any, asked: Any) -> torch.Tensor:
        out = product(x, matrix, asked._replace(form=fast_fused.PLAIN))
        return out if is_equal or asked == kernel else -out

    monkeypatch.setattr(fast_fused, "_product", plain)
    monkeypatch.setattr(fast_fused, "_check", lambda *arguments: True)
    bench = Bench(torch.device("cpu"), 1, time.monotonic() + 100)
    fast_fused._compare_form(bench, kernel, {}, {})
    (row,) = bench.rows
    assert row["found"] == f"{'equal' if is_equal else 'other'} bits beside prmt"
    assert len(bench.wrong) == ("wrong_bits" in row) == (not is_equal)


def test_cases_for_which_no_time_is_left_are_named_and_not_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    import bench_kernels

    assert bench_kernels.main(["--device", "cpu", "--seconds", "0"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "not measured" in line]
    assert len(rows) >= len(bench_kernels.SECTIONS)
    assert all("out of time" in row for row in rows)


@pytest.mark.parametrize("script", ["bench_kernels", "tune_kernels", "sanitize_kernels"])
def test_without_a_gpu_scripts_end_with_status_2_and_a_sentence(
    script: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    module = __import__(script)
    assert module.main([]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "cannot run: torch" in error
    assert "--device cpu" in error


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_setup

    monkeypatch.setattr(bench_setup, "NEEDED", ("torch", "no_such_package"))
    with pytest.raises(bench_setup.CannotRunError, match="no package no_such_package; needed"):
        bench_setup.prepare("cpu")


def test_tuning_prints_an_entry_that_can_be_pasted_and_leaves_no_parameter_behind(
    capsys: pytest.CaptureFixture[str],
) -> None:
    import tune_kernels

    assert tune_kernels.main(["--device", "cpu", "--only", "dfloat11_num_warps"]) == 0
    from vllm_dfloat.kernels import configs

    lines = capsys.readouterr().out.splitlines()
    table = eval("{" + lines[-1] + "}", dict(vars(configs)))
    (config,) = table.values()
    assert config.measured
    assert config.dfloat11_num_warps in tune_kernels.CANDIDATES["dfloat11_num_warps"]
    assert config_of(torch.device("cpu")) is INTERPRETED


def test_tuning_prints_no_choice_where_a_candidate_changes_bits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import tune_kernels

    def spoiled_where_small(*arguments: Any) -> None:
        is_small = config_of(torch.device("cpu")).decode_tiles_per_program < 4
        (spoiled if is_small else REAL_DECODE)(*arguments)

    monkeypatch.setattr(ops, "decode", spoiled_where_small)
    assert tune_kernels.main(["--device", "cpu", "--only", "decode_tiles_per_program"]) == 1
    printed = capsys.readouterr()
    assert "LaunchConfig" not in printed.out
    assert "wrong bits" in printed.err


def test_every_launch_parameter_is_tuned_or_derived_or_named_as_not_tuned() -> None:
    import tune_kernels

    named = [*tune_kernels.CANDIDATES, *tune_kernels.DERIVED, *tune_kernels.NOT_TUNED]
    named += tune_kernels.WITH_FUSED_MAX_ROWS
    assert sorted([*named, "measured"]) == sorted(vars(INTERPRETED))  # no launcher reads that one


@pytest.mark.parametrize(
    ("won", "expected"),
    [
        ({(28_672, 4096): 4, (4096, 4096): 2, (4096, 14_336): 1, (6144, 4096): 4}, (1, 4, 6144)),
        ({(28_672, 4096): 4, (4096, 4096): 4, (6144, 4096): 2}, (2, 4, 28_672)),
        ({(28_672, 4096): 1, (4096, 4096): 2}, (1, 1, 4096)),
        ({(3, 2048): 0}, (0, 0, 3)),
    ],
)
def test_fused_products_are_chosen_by_shape_and_never_where_they_lost(
    won: dict[tuple[int, int], int], expected: tuple[int, int, int]
) -> None:
    from bench.kernels import tune_cases

    fields = tune_cases.rows_by_shape(won)
    assert tuple(fields.values()) == expected
    config = replace(INTERPRETED, **fields)
    assert all(config.max_fused_rows(rows) <= most for (rows, _), most in won.items())


def test_tuning_of_fused_products_prints_what_it_chose_for_both_kinds_of_shapes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    import tune_kernels

    assert tune_kernels.main(["--device", "cpu", "--only", "fused_max_rows"]) == 0
    assert "fused_large_rows=3" in capsys.readouterr().out.splitlines()[-1]


def test_shares_of_the_small_checks_cover_all_of_them_once() -> None:
    import sanitize_kernels

    names = list(sanitize_kernels.checks(torch.device("cpu")))
    shares = [sanitize_kernels.share(f"{i}/3") for i in range(3)]
    assert sorted(name for i, n in shares for name in names[i::n]) == sorted(names)
    for text in ("3/3", "1", "a/b", "-1/2"):
        with pytest.raises(sanitize_kernels.argparse.ArgumentTypeError, match=text):
            sanitize_kernels.share(text)


def test_small_check_that_fails_is_named_and_does_not_end_the_others(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sanitize_kernels

    monkeypatch.setattr(ops, "decode", spoiled)
    arguments = ["--device", "cpu", "packed_decode", "official_unit"]
    assert sanitize_kernels.main(arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("WRONG: packed_decode: WrongBitsError: decode: 1 of ")
    assert lines[1].startswith("right bits: official_unit")


def test_small_checks_that_do_not_exist_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    import sanitize_kernels

    with pytest.raises(SystemExit, match="2"):
        sanitize_kernels.main(["--device", "cpu", "packed_decod"])
    assert (
        "no check packed_decod; there are fast_experts_product, fast_in_order"
        in capsys.readouterr().err
    )


def test_commit_can_be_told_where_there_is_no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_setup

    monkeypatch.setenv("VLLM_DFLOAT_COMMIT", "0123abcd")
    assert bench_setup.commit() == "0123abcd"


@pytest.fixture(scope="module", autouse=True)
def _forget_scripts() -> Iterator[None]:
    yield
    for name in list(sys.modules):
        if name.startswith(("bench_", "tune_", "sanitize_")):
            del sys.modules[name]
