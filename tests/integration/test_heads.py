"""Products with an LM head that is larger than the scratch: slabs where proven, or else the whole head."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from head_layers import (
    COLS,
    CPU,
    ROWS,
    counting,
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

from vllm_dfloat.device import fast_fused, fast_ops, fused, ops
from vllm_dfloat.device.scratch import MAIN_SLOT, scratch
from vllm_dfloat.errors import DeviceError
from vllm_dfloat.integration.layers import head_op, in_order, layouts, linear_op


@pytest.fixture(autouse=True)
def in_vllm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> Iterator[None]:
    caplog.set_level("INFO", "vllm.dfloat11")
    with loading(monkeypatch, tmp_path / "slabs"):
        yield


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", ["packed", "fast", "dfloat11"])
def test_logits_have_the_bits_of_the_whole_head_and_the_scratch_does_not_hold_it(
    layout: str, bias: bool
) -> None:
    model = prepared(bias, layout=layout)
    assert model.lm_head.quant_method.slab == 512
    assert model.lm_head.quant_method.layout == layout
    for num_x in (*range(1, 10), 40, 41):
        x = normal(num_x, COLS)
        assert same_bits(logits(model, x), expected(model, x)), num_x
    assert scratch.num_bytes(CPU) < 2 * ROWS * COLS // 3
    assert known().equal >= {5, 6, 8}  # else this test shows nothing


def test_where_the_gemm_changes_its_order_the_whole_head_is_decoded_for_the_time_of_a_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(monkeypatch, shape_dependent(lambda num_x: num_x % 2 == 1))
    model = prepared()
    assert known().equal == set(range(2, 41, 2))
    logits(model, normal(2, COLS))
    decoded, held = counting(monkeypatch), scratch.num_bytes(CPU)
    for num_x in range(1, 50):
        x = normal(num_x, COLS)
        assert same_bits(logits(model, x), expected(model, x)), num_x
    assert decoded == [*range(1, 41, 2), *range(41, 50)]
    assert scratch.num_bytes(CPU) == held < 2 * ROWS * COLS // 3


def test_slabs_of_that_gemm_would_give_other_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, shape_dependent(lambda num_x: True))
    model = prepared()
    known().equal = frozenset([40])
    x = normal(40, COLS)
    assert not same_bits(logits(model, x), expected(model, x))


def test_the_first_product_takes_the_memory_of_the_whole_head_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # vLLM's profile run makes it: the head counts among the activations.
    use(monkeypatch, shape_dependent(lambda num_x: num_x > 6))
    model, decoded = prepared(), counting(monkeypatch)
    logits(model, normal(6, COLS))
    logits(model, normal(6, COLS))
    assert decoded == [6]


def test_nothing_is_counted_if_slabs_are_equal_for_every_number_of_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(monkeypatch, shape_dependent(lambda num_x: False))
    model, decoded = prepared(), counting(monkeypatch)
    for num_x in range(1, 41):
        logits(model, normal(num_x, COLS))
    assert not decoded


@pytest.mark.parametrize("how", ["three dimensions", "not contiguous"])
def test_activations_that_lie_otherwise_than_those_compared_get_the_whole_head(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, lambda name: torch.nn.functional.linear)
    model = prepared()
    logits(model, normal(4, COLS))
    decoded = counting(monkeypatch)
    x = normal(2, 2, COLS) if how == "three dimensions" else normal(4, 2 * COLS)[:, :COLS]
    assert same_bits(logits(model, x), expected(model, x))
    assert decoded == [4]


def test_no_memory_for_the_whole_head_is_an_error_that_names_the_option(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(monkeypatch, shape_dependent(lambda num_x: True))
    model = prepared()

    def full(*args: Any, **options: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(head_op.torch, "empty", full)
    with pytest.raises(DeviceError, match=r'lm_head.*1048576 bytes.*out of memory.*"slab": "off"'):
        logits(model, normal(3, COLS))


def test_the_whole_head_is_not_decoded_during_graph_capture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(monkeypatch, shape_dependent(lambda num_x: num_x % 2 == 1))
    model = prepared()
    logits(model, normal(2, COLS))
    monkeypatch.setattr(head_op, "_is_capturing", lambda device: True)
    x = normal(4, COLS)
    assert same_bits(logits(model, x), expected(model, x))
    with pytest.raises(DeviceError, match=r'3 rows .* graph capture; .*"slab": "off"'):
        logits(model, normal(3, COLS))


@pytest.mark.parametrize(
    ("layout", "pack", "matmul"),
    [
        ("packed", ops.pack, fused.matmul),
        ("fast", fast_ops.pack_again, fast_fused.matmul),
    ],
)
def test_a_few_rows_are_multiplied_from_packed_weights_in_the_scratch_of_a_slab(
    layout: str, pack: Any, matmul: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_DFLOAT_BACKEND", "triton")
    rows, cols = 512, 1024  # the interpreter takes its time
    weight, x = normal(rows, cols, std=0.02), normal(1, cols)
    packed = pack(weight, "head")
    found = head_op.op(x, packed.desc, None, [rows, cols, 1, 0, 64], linear_op.PLAIN, layout)
    assert same_bits(found, matmul(x, packed.desc, rows, cols))
    assert scratch.numel(CPU, MAIN_SLOT) < rows * cols // 4


def without_decoding(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Let the fast layout multiply up to `most` rows in the order of the test's GEMM; return for how many it did."""
    multiplied: list[int] = []

    def launch(x: torch.Tensor, desc: torch.Tensor, *of: Any) -> torch.Tensor:
        multiplied.append(len(x))
        rows, cols, bias, _ = of
        out = torch.empty(rows * cols, dtype=torch.bfloat16)
        status = torch.empty(ROWS, dtype=torch.int32)
        fast_ops.decode(desc, rows, cols, out, status)
        return shape_dependent(lambda num_x: True)("any")(x, out.view(rows, cols), bias)

    held = layouts.BY_NAME["fast"]
    assert held.in_order is not None
    product = replace(
        held.in_order, launch=launch, max_rows=lambda *of: most, variants=lambda *of: {}
    )
    by_name = cast(dict[str, layouts.Layout], layouts.BY_NAME)
    monkeypatch.setitem(by_name, "fast", replace(held, in_order=product))
    monkeypatch.setattr(in_order, "known", {})
    return multiplied


@pytest.mark.parametrize("bias", [False, True])
def test_a_head_in_slabs_is_not_decoded_at_numbers_of_rows_at_which_that_is_proven(
    bias: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use(monkeypatch, shape_dependent(lambda num_x: num_x <= 4))
    multiplied, decoded = without_decoding(monkeypatch, 4), counting(monkeypatch)
    model = prepared(bias, layout="fast", mode="fused-exact")
    # Slabs are equal from 5 rows on; so the whole head is not needed, and not counted.
    assert known() == head_op.Known(frozenset(range(5, 41)), False)
    assert "equal bits at 36 of the 40 numbers of rows that were compared" in caplog.text
    assert caplog.text.splitlines()[-1].endswith("; not decoded at 4 numbers of rows")
    multiplied.clear()
    for num_x in (1, 4, 5, 40):
        x = normal(num_x, COLS)
        assert same_bits(logits(model, x), expected(model, x))
    assert multiplied == [1, 4]
    assert not decoded
    assert scratch.numel(CPU, MAIN_SLOT) < ROWS * COLS


def test_other_activations_of_a_head_that_is_not_decoded_get_the_whole_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(monkeypatch, shape_dependent(lambda num_x: True))
    multiplied, decoded = without_decoding(monkeypatch, 6), counting(monkeypatch)
    model = prepared(layout="fast", mode="fused-exact")
    multiplied.clear()
    logits(model, normal(3, COLS))  # the first one takes the memory that more rows may need
    assert (multiplied, decoded) == ([3], [3])
    x = normal(3, 2 * COLS)[:, :COLS]
    assert same_bits(logits(model, x), expected(model, x))
    assert (multiplied, decoded) == ([3], [3, 3])


def test_a_head_whose_product_without_decoding_has_other_bits_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(monkeypatch, lambda name: torch.nn.functional.linear)
    multiplied = without_decoding(monkeypatch, 4)
    model = prepared(layout="fast", mode="fused-exact")
    multiplied.clear()
    x = normal(2, COLS)
    assert same_bits(logits(model, x), expected(model, x))
    assert not multiplied


@pytest.mark.parametrize("most", [1, 4, 5, 64])
def test_sums_of_the_fast_product_of_any_number_of_rows_fit_in_what_is_reserved(most: int) -> None:
    from vllm_dfloat.kernels import fast_matmul as kernels
    from vllm_dfloat.kernels.configs import config_of

    config = config_of(CPU).fast_product
    for rows in (64, 2048, 30_000, 128_256):
        sizes = [
            kernels.num_partials(rows, n, config.launch_shape(rows, 1024, n))
            for n in range(1, most + 1)
        ]
        assert fast_fused.partials(CPU, rows, 1024, most) == max(sizes)
