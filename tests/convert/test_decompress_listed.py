"""`decompress` and the manifest: damaged weights are an error, an edited config is only a line of output."""

import json
from pathlib import Path

import pytest
from cli_commands import only_line
from small_models import bf16, make_model

from vllm_dfloat.checkpoint.manifest import MANIFEST_FILE
from vllm_dfloat.checkpoint.verify import compare
from vllm_dfloat.cli import main
from vllm_dfloat.storage.safetensors_read import read_header

TENSORS = {
    "model.layers.0.mlp.up_proj.weight": bf16(64, 96),
    "model.norm.weight": bf16(1, 64)[0],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a compressed model with a tokenizer, and one layer in a separate file."""
    model = make_model(tmp_path / "m", TENSORS, tie_word_embeddings=False)
    (model / "tokenizer.json").write_text("{}")
    (model / "sparse_linear.pt").write_bytes(b"a pickle")
    assert main(["compress", str(model), str(tmp_path / "df11"), "--quiet"]) == 0
    return tmp_path / "df11"


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "field",
    ["sign_mantissa", "encoded_exponent", "luts", "gaps", "output_positions", "plain", "pt"],
)
def test_a_flipped_bit_in_any_weight_file_is_named_and_nothing_is_written(
    field: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Bug caught: wrong weights were written with exit status 0, though the manifest has the SHA-256 of the right ones.
    if field == "pt":
        name, at = "sparse_linear.pt", 3
    else:
        name = "model.safetensors" if field == "plain" else "model_layers_0.safetensors"
        wanted = "model.norm.weight" if field == "plain" else f"model.layers.0.{field}"
        at = read_header(folder / name)[wanted].begin
    flip(folder / name, at)
    assert main(["decompress", str(folder), str(tmp_path / "b")]) == 2
    line = only_line(capsys.readouterr().err)
    assert field in ("luts", "gaps", "output_positions") or f"{folder / name}: SHA-256 " in line
    assert not (tmp_path / "b").exists()
    assert main(["decompress", str(folder), str(tmp_path / "b"), "--force", "--quiet"]) == 2


def test_a_listed_weight_file_that_is_missing_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "sparse_linear.pt").unlink()
    assert main(["decompress", str(folder), str(tmp_path / "b")]) == 2
    line = only_line(capsys.readouterr().err)
    assert f"that {MANIFEST_FILE} lists: sparse_linear.pt is missing" in line
    assert not (tmp_path / "b").exists()


def test_without_a_manifest_nothing_says_what_the_bytes_should_be(
    folder: Path, tmp_path: Path
) -> None:
    (folder / MANIFEST_FILE).unlink()
    (folder / "sparse_linear.pt").unlink()
    more = ["--original", str(tmp_path / "m"), "--quiet"]
    assert main(["decompress", str(folder), str(tmp_path / "b"), *more]) == 0


def test_an_edited_config_is_taken_with_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["decompress", str(folder), str(tmp_path / "b")]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 7}))
    (folder / "tokenizer.json").write_text("[]")
    assert main(command) == 0
    line, _ = capsys.readouterr().out.splitlines()
    assert line.startswith(f"config.json, tokenizer.json: not as {MANIFEST_FILE} says; taken as ")
    assert compare(tmp_path / "b", tmp_path / "m").is_equal
    assert json.loads((tmp_path / "b/config.json").read_text())["max_position_embeddings"] == 7
    assert main([*command, "--json"]) == 0  # finished before: the same is said
    found = json.loads(capsys.readouterr().out)
    assert (found["was_finished"], found["not_as_listed"]) == (
        True,
        ["config.json", "tokenizer.json"],
    )
    assert main([*command[:2], str(tmp_path / "c"), "--json"]) == 0


def test_the_bytes_that_are_compared_are_in_the_progress(folder: Path, tmp_path: Path) -> None:
    from vllm_dfloat.convert.decompress import decompress

    starts: list[int] = []
    steps: list[int] = []
    decompress(
        folder, tmp_path / "b", start=lambda a, b: starts.append(a - b), advance=steps.append
    )
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert starts == [sum(steps)]
    assert sum(steps) == weights + 8 + 2 * (64 * 96 + 64)  # sparse_linear.pt has 8
