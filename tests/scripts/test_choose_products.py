"""The table of launches that is chosen from measured products."""

import json
from pathlib import Path
from typing import Any

import pytest
from bench.kernels.fast_fused import AHEAD, WARPS_1, name_of, tried
from choose_products import CUBLAS, DECODE, main

from vllm_dfloat.kernels.fast_product import Choice, DotShape, FastProduct, GemvShape

MATRICES = {"gate_up": (28_672, 4096), "down": (4096, 14_336)}


def rows(num_x: int, decode: float = 3.0, **best: Any) -> list[dict[str, Any]]:
    """Return the rows of both matrices for some rows of activations; best: the shape that is fastest for each."""
    found = []
    for name, size in MATRICES.items():
        case = {"section": "fast_fused", "case": f"{name} {size[0]} x {size[1]}, {num_x} rows"}
        found += [case | {"name": CUBLAS, "ratio": 1.0}, case | {"name": DECODE, "ratio": decode}]
        for kernel in tried(*size, num_x):
            shape, wanted = kernel.shape, best[name]
            is_best = isinstance(shape, type(wanted)) and shape.stages == wanted.stages
            ratio = 0.8 if is_best else 1.5
            found.append(case | {"name": name_of(kernel.shape), "ratio": ratio})
    return found


def chosen(path: Path, found: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> Any:
    path.write_text(json.dumps({"environment": {"device": "a GPU"}, "rows": found}))
    assert main([str(path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("a GPU\n")
    names = {"FastProduct": FastProduct, "Choice": Choice, "DotShape": DotShape}
    return eval(out[out.index("FastProduct(") :], names | {"GemvShape": GemvShape})


def test_the_fastest_launch_is_chosen_for_large_and_other_matrices(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = rows(16, gate_up=AHEAD, down=WARPS_1) + rows(1, gate_up=GemvShape(), down=AHEAD)
    table = chosen(tmp_path / "found.json", found, capsys)
    lines = [(line.up_to, line.from_rows) for line in table.choices]
    assert lines == [(1, 16_384), (1, 0), (16, 16_384), (16, 0)]
    assert all(line.measured for line in table.choices)
    assert isinstance(table.launch_shape(28_672, 4096, 1), GemvShape)
    assert table.launch_shape(4096, 14_336, 1).stages == AHEAD.stages
    assert table.launch_shape(28_672, 4096, 9).stages == AHEAD.stages
    assert table.launch_shape(4096, 14_336, 16).rows == WARPS_1.rows


def test_nothing_is_chosen_from_where_decoding_is_faster(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [
        *rows(1, gate_up=GemvShape(), down=GemvShape()),
        *rows(8, decode=0.7, gate_up=AHEAD, down=AHEAD),
        *rows(16, gate_up=AHEAD, down=AHEAD),
    ]
    table = chosen(tmp_path / "found.json", found, capsys)
    assert table.max_rows(28_672) == table.max_rows(4096) == 1


def test_a_launch_with_wrong_bits_is_not_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = rows(8, gate_up=AHEAD, down=AHEAD)
    for row in found:
        if row["name"] in {name_of(k.shape) for k in tried(28_672, 4096, 8) if k.shape.stages == 1}:
            row["wrong_bits"] = "a row"
    table = chosen(tmp_path / "found.json", found, capsys)
    assert {line.shape.stages for line in table.choices if line.from_rows} == {3}


@pytest.mark.parametrize(
    ("text", "status"), [("{}", 2), ("no JSON", 2), ('{"rows": [{"section": "decode"}]}', 1)]
)
def test_a_file_without_products_ends_with_a_sentence(
    text: str, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "found.json"
    file.write_text(text)
    try:
        found = main([str(file)])
    except SystemExit as ended:
        found = int(ended.code or 0)
    assert found == status
    assert str(file) in capsys.readouterr().err
