"""The command line as a user types it: exit status, stdout, stderr."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from cli_commands import make_places, only_line
from safetensors.numpy import load_file, save_file

from vllm_dfloat.checkpoint.summary import Row, grouped
from vllm_dfloat.cli import main

VECTORS = Path(__file__).parents[1] / "data/vectors"
MODELS = ["llama-tiny", "llama-tiny-single", "qwen3-tiny-tied", "phi3-tiny-fused"]


@pytest.fixture
def original(bf16_checkpoint):
    """Return a function: name of a vector -> folder of its BF16 original; the stored one if there is one."""

    def find(name: str) -> Path:
        stored = VECTORS / f"{name}-bf16"
        return stored if stored.exists() else bf16_checkpoint(name)

    return find


@pytest.fixture
def copy(tmp_path: Path, original):
    """Return a function that copies a vector's BF16 original to a folder which a test may damage."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(original(name), tmp_path / name))

    return make


def change_weight(folder: Path, name: str) -> None:
    """Flip the lowest mantissa bit of one weight, element 5."""
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    tensors = load_torch(folder / "model.safetensors")
    import torch

    tensors[name].view(torch.uint16).reshape(-1)[5] ^= 1
    save_torch(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("model", MODELS)
def test_verify_says_equal_and_exits_0(
    model: str, original, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(["verify", str(VECTORS / f"{model}-df11"), "--against", str(original(model))])
    out, err = capsys.readouterr()
    assert status == 0, err
    assert "bit for bit" in out
    assert err == ""


def test_verify_names_tensor_and_first_element_and_exits_1(
    copy, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = copy("llama-tiny-single")
    name = "model.layers.0.mlp.down_proj.weight"
    change_weight(damaged, name)
    status = main(["verify", str(VECTORS / "llama-tiny-single-df11"), "--against", str(damaged)])
    out, _ = capsys.readouterr()
    assert status == 1
    assert f"{name}: 1 of 73728 elements differ, the first at 5: " in out
    assert "DIFFERENT" in out


def test_verify_names_tensors_that_only_one_side_has(
    copy, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = copy("llama-tiny-single")
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    tensors = load_torch(damaged / "model.safetensors")
    tensors["added.weight"] = tensors.pop("model.norm.weight")
    save_torch(tensors, damaged / "model.safetensors")
    assert main(["verify", str(VECTORS / "llama-tiny-single-df11"), "--against", str(damaged)]) == 1
    out, _ = capsys.readouterr()
    assert "model.norm.weight: not in" in out
    assert "added.weight: not in" in out


def test_verify_alone_decodes_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(VECTORS / "llama-tiny-df11")]) == 0
    assert "decode without an error" in capsys.readouterr().out


def test_verify_of_a_plain_model_says_that_nothing_is_compressed_and_misses_a_tensor(
    copy, capsys: pytest.CaptureFixture[str]
) -> None:
    # Bug caught: every BF16 folder "decodes without an error", even an incomplete one.
    from safetensors.torch import load_file, save_file

    plain = copy("llama-tiny-single")
    assert main(["verify", str(plain)]) == 0
    assert ", none of them compressed (give --against to compare)" in capsys.readouterr().out
    tensors = load_file(plain / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, plain / "model.safetensors")
    assert main(["verify", str(plain)]) == 2
    assert "model.norm.weight" in capsys.readouterr().err


def test_quiet_verify_prints_nothing_when_equal(
    original, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(VECTORS / "phi3-tiny-fused-df11"), str(original("phi3-tiny-fused"))]
    assert main(["verify", paths[0], "--against", paths[1], "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_bad_input_is_one_sentence_without_a_traceback_and_exits_2(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(tmp_path / "nowhere")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("vllm-dfloat: ")
    assert "nowhere: no such folder" in err
    assert "Traceback" not in err


def test_debug_shows_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "nowhere"), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_unit_that_must_be_refused_is_named_and_exits_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status = main(
        [
            "verify",
            str(VECTORS / "edge-bad-must-refuse-df11"),
            "--against",
            str(VECTORS / "edge-bad-must-refuse-bf16"),
        ]
    )
    assert status == 2
    assert "model.safetensors: " in capsys.readouterr().err


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _luts_of_infinity(file: Path) -> None:
    tensors = load_file(file)
    luts = next(name for name in tensors if name.endswith(".luts"))
    tensors[luts][-1, 255] = 1
    save_file(tensors, file)


DAMAGED = {
    "config.json": lambda file: file.write_text(""),
    "dfloat11_manifest.json": lambda file: file.write_text("{"),
    "model_embed_tokens.safetensors": _luts_of_infinity,
    "model_layers_0.safetensors": _cut,
    "model.safetensors": _cut,
    "model.safetensors.index.json": lambda file: file.write_text('{"weight_map": {"a": "b"}}'),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named_with_its_folder_and_what_to_do(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Bug caught: "config.json: is not valid JSON", of two folders that have one.
    places = make_places(tmp_path)
    bf16, df11 = places["bf16"], places["df11"]
    is_plain = name.startswith("model.safetensors")
    file = (bf16 if is_plain else df11) / name
    if name != "dfloat11_manifest.json":
        (
            df11 / "dfloat11_manifest.json"
        ).unlink()  # it says that weight files are others than it lists
    DAMAGED[name](file)
    assert main(["verify", str(df11), "--against", str(bf16), "--quiet"]) == 2
    line = only_line(capsys.readouterr().err)
    assert line.startswith(f"vllm-dfloat: {file}: ")
    assert re.search(r"(etch (it|the file|both) again|take the original BF16 file)\.$", line)


def test_pickle_checkpoints_are_refused_unread(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "layer_0.pkl").write_bytes(b"not even a pickle")
    assert main(["inspect", str(tmp_path)]) == 2
    assert "legacy" in capsys.readouterr().err


def test_a_compressed_folder_is_refused_as_the_original(capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(VECTORS / "llama-tiny-df11")
    assert main(["verify", folder, "--against", folder]) == 2
    assert "--against expects the uncompressed BF16 original" in capsys.readouterr().err


def test_inspect_totals_are_the_bytes_of_the_files(capsys: pytest.CaptureFixture[str]) -> None:
    folder = VECTORS / "llama-tiny-df11"
    assert main(["inspect", str(folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    stored = [tensor for file in folder.glob("*.safetensors") for tensor in raw_bytes(file)]
    assert report["totals"]["all"]["num_bytes"] == sum(stored)
    units = {row["name"]: row for row in report["modules"] if row["kind"] == "dfloat11"}
    assert set(units) == {"lm_head", "model.embed_tokens", "model.layers.0", "model.layers.1"}
    layer = units["model.layers.0"]
    assert layer["weights"] == 2 * 256 * 256 + 2 * 128 * 256 + 3 * 288 * 256
    assert layer["bits_per_weight"] == 8 * layer["num_bytes"] / layer["weights"]


def raw_bytes(file: Path) -> list[int]:
    header = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])
    return [
        v["data_offsets"][1] - v["data_offsets"][0]
        for k, v in header.items()
        if k != "__metadata__"
    ]


def test_inspect_table_has_a_line_per_module_and_a_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["inspect", str(VECTORS / "qwen3-tiny-tied-df11")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "module",
        "kind",
        "count",
        "members",
        "weights",
        "bytes",
        "bits/weight",
        "of",
        "BF16",
    ]
    assert any(line.startswith("model.layers.1 ") for line in lines)
    assert "2 units compressed" in lines[-1]


def test_inspect_shows_repeated_tensors_in_one_row_with_their_count(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Bug caught: a row for each of 65 norms, among which the units cannot be found.
    folder = VECTORS / "llama-tiny-df11"
    assert main(["inspect", str(folder)]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert rows["model.layers.*.input_layernorm.weight"][:4] == ["plain", "2", "2", "512"]
    assert rows["model.norm.weight"][:4] == ["plain", "1", "1", "256"]
    assert not any("layers.0." in name for name in rows)
    assert {"model.layers.0", "model.layers.1"} <= rows.keys()  # units differ, and have a row each


def test_rows_are_grouped_by_kind_and_size_and_experts_by_layer() -> None:
    def unit(name: str, num_bytes: int) -> Row:
        return Row(name, "dfloat11", 3, 100, num_bytes, 200)

    def plain(name: str, weights: int) -> Row:
        return Row(name, "plain", 1, weights, 2 * weights, 2 * weights)

    rows = [unit(f"h.{i}", 130 + i) for i in range(2)]
    rows += [unit(f"h.{i}.experts.{k}", 130 + k) for i in range(2) for k in range(3)]
    rows += [plain("h.0.norm.weight", 8), plain("h.1.norm.weight", 8), plain("h.2.norm.weight", 9)]
    assert grouped(rows) == [
        (rows[0], 1),
        (rows[1], 1),
        (Row("h.0.experts.*", "dfloat11", 9, 300, 393, 600), 3),
        (Row("h.1.experts.*", "dfloat11", 9, 300, 393, 600), 3),
        (Row("h.*.norm.weight", "plain", 2, 16, 32, 32), 2),
        (rows[-1], 1),
    ]


def test_inspect_of_a_plain_folder_says_that_nothing_is_compressed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"a": np.zeros((3, 4), np.float32)}, tmp_path / "model.safetensors")
    assert load_file(tmp_path / "model.safetensors")["a"].shape == (3, 4)
    assert main(["inspect", str(tmp_path)]) == 0
    assert "nothing is compressed on disk" in capsys.readouterr().out
