"""The proof that slabs give the bits of the whole head, and the folder that keeps it."""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from head_layers import (
    COLS,
    CPU,
    ROWS,
    expected,
    known,
    loading,
    logits,
    normal,
    prepared,
    shape_dependent,
    use,
)
from helpers import same_bits

from vllm_dfloat.integration.layers import head_op, head_proof, heads, proof_cache
from vllm_dfloat.integration.layers.head_proof import SlabProduct
from vllm_dfloat.integration.seam import row_counts


@pytest.fixture(autouse=True)
def in_vllm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> Iterator[None]:
    caplog.set_level("INFO", "vllm.dfloat11")
    with loading(monkeypatch, tmp_path / "slabs"):
        yield


@pytest.mark.parametrize("bias", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_x", [1, 2, 7])
def test_a_proof_sees_every_change_of_the_order_of_additions(
    num_x: int, bias: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Bug caught: with values as in a model, rounding to BF16 hides most changes, and all of them in a small head.
    product = SlabProduct(CPU, 256, COLS, 128, "auto", bias)

    def last_two_first(x: torch.Tensor, weight: torch.Tensor, bias: Any) -> torch.Tensor:
        x, weight = x.float(), weight.float()
        order = [*range(COLS)] if len(weight) == 256 else [COLS - 1, COLS - 2, *range(COLS - 2)]
        y = torch.zeros(len(x), len(weight)) if bias is None else bias.float().expand(len(x), -1)
        for column in order:
            y = y + x[:, column, None] * weight[None, :, column]
        return y.bfloat16()

    monkeypatch.setattr(head_proof, "find_gemm", lambda name: last_two_first)
    assert not head_proof.equal_counts(product, [num_x])


def test_a_proof_is_kept_and_the_next_start_compares_nothing(
    monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    prepared()
    before = known().equal
    head_op.known.clear()
    monkeypatch.setattr(heads, "compare", lambda *a: pytest.fail("compared again"))
    prepared()
    assert known().equal == before
    assert "in 4 slabs of 512 rows" in log_lines[-1]


DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no JSON": lambda content: "{",
    "a list": lambda content: [content],
    "of another shape": lambda content: {**content, "key": {**content["key"], "rows": 1}},
    "equal, but not compared": lambda content: {**content, "compared": [[1, 2]]},
    "a run backwards": lambda content: {**content, "equal": [[3, 1]]},
    "no runs": lambda content: {**content, "equal": {"1": 3}},
    "huge runs": lambda content: {**content, "compared": [[1, 1 << 20]] * 9},
    "truths": lambda content: {**content, "equal": [[True, True]]},
    # Bug caught: slabs were believed where their bits differ, after one digit on the disk had changed.
    "another number": lambda content: {**content, "equal": [[1, 3], *content["equal"][1:]]},
    "no digest": lambda content: {k: v for k, v in content.items() if k != "digest"},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_proof_is_ignored_with_a_line_and_made_anew(
    damage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, log_lines: list[str]
) -> None:
    use(monkeypatch, shape_dependent(lambda num_x: num_x % 3 == 0))
    prepared()
    (file,) = (tmp_path / "slabs").iterdir()
    good = file.read_text()
    bad = DAMAGES[damage](json.loads(good))
    file.write_text(bad if isinstance(bad, str) else json.dumps(bad))
    head_op.known.clear()
    prepared()
    assert known().equal == {num_x for num_x in range(1, 41) if num_x % 3}
    assert any(f"{file} is ignored and made anew" in line for line in log_lines)
    assert file.read_text() == good


def test_a_folder_that_cannot_be_written_to_costs_only_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(proof_cache, "folder", lambda: tmp_path / "file" / "slabs")
    prepared()
    assert known().equal


def test_a_proof_holds_for_one_product_on_one_machine() -> None:
    product = SlabProduct(CPU, ROWS, COLS, 512, "auto")
    key = proof_cache.key_of(product)
    assert key["torch"] == torch.__version__
    assert any(name.startswith("libtorch_cpu") for name, *_ in key["libraries"])
    other = proof_cache.key_of(SlabProduct(CPU, ROWS, COLS, 256, "auto"))
    assert proof_cache.file_of(key) != proof_cache.file_of(other)


def test_a_proof_does_not_hold_for_a_processor_that_lacks_instructions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Bug caught: virtual machines that share a cache folder, and the name of their processors, but not AMX.
    product, keys = SlabProduct(CPU, ROWS, COLS, 512, "auto"), []
    for flags in ("fpu avx512_bf16 amx_bf16", "fpu avx512_bf16"):
        (tmp_path / "cpuinfo").write_text(
            f"processor\t: 0\nmodel name\t: A\ncpu MHz\t\t: {len(keys)}\nflags\t\t: {flags}\n"
        )
        monkeypatch.setattr(proof_cache, "PROCESSOR_FILE", tmp_path / "cpuinfo")
        keys.append(proof_cache.key_of(product))
    assert keys[0]["device"] != keys[1]["device"]
    assert not any("MHz" in line for line in keys[0]["device"])


def test_work_is_counted_in_operations_from_the_most_usual_numbers_of_rows_on() -> None:
    assert row_counts.in_order(20, 22)[:6] == [1, 2, 4, 8, 16, 3]
    assert sorted(row_counts.in_order(20, 22)) == list(range(1, 23))
    product = SlabProduct(CPU, ROWS, COLS, 512, "auto")
    one = 4 * ROWS * COLS * head_proof.least_rows(CPU)
    assert head_proof.affordable(product, row_counts.in_order(20, 22), 4 * one) == [1, 2, 4, 8]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
    ids=["GPU", "CPU"],
)
def test_too_little_memory_for_a_proof_proves_nothing_is_no_error_and_is_not_kept(
    error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> torch.Tensor:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(head_proof, "_differs", full)
        model = prepared()
    assert known().equal == frozenset()
    x = normal(3, COLS)
    assert same_bits(logits(model, x), expected(model, x))
    head_op.known.clear()
    prepared()
    assert known().equal  # Bug caught: what was not compared was kept as different for good.


def test_a_proof_that_cannot_be_put_into_its_place_leaves_no_file_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(proof_cache, "folder", lambda: tmp_path)
    product = SlabProduct(CPU, ROWS, COLS, 512, "auto")
    place = proof_cache.file_of(proof_cache.key_of(product))
    place.mkdir()
    proof_cache.save(product, {1}, {1})
    assert [*tmp_path.iterdir()] == [place]


def test_what_a_killed_save_left_is_removed_and_one_at_work_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Bug caught: one folder for ever per killed start.
    monkeypatch.setattr(proof_cache, "folder", lambda: tmp_path)
    for name, age in (("killed", 7200), ("at-work", 0)):
        left = tmp_path / f"saving-{name}"
        left.mkdir()
        (left / "x.json").write_text("{}")
        os.utime(left, (time.time() - age,) * 2)
    proof_cache.save(SlabProduct(CPU, ROWS, COLS, 512, "auto"), {1}, {1})
    assert [left.name for left in tmp_path.glob("saving-*")] == ["saving-at-work"]
    assert len([*tmp_path.glob("*.json")]) == 1
