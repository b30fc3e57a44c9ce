"""`decompress --original`: it tells the shapes that nothing else does, and never overrides what the checkpoint says."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from cli_commands import only_line
from conftest import Checkpoint
from dfloat11_helpers import VECTORS
from safetensors.torch import load_file, save_file
from small_models import bf16, make_model

from vllm_dfloat.checkpoint.manifest import MANIFEST_FILE
from vllm_dfloat.cli import main

Capture = pytest.CaptureFixture[str]
LLAMA = VECTORS / "llama-tiny-df11"  # without a manifest
UP = "model.layers.0.mlp.up_proj"
TENSORS = {f"{UP}.weight": bf16(32, 64), "model.norm.weight": bf16(1, 64)[0]}


def transposed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: t.t().contiguous() if t.dim() == 2 else t for n, t in tensors.items()}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Give a checkpoint with a manifest, beside its source `bf16`."""
    make_model(tmp_path / "bf16", TENSORS, tie_word_embeddings=False)
    assert main(["compress", str(tmp_path / "bf16"), str(tmp_path / "d"), "--quiet"]) == 0
    return tmp_path / "d"


def decompress(folder: Path, original: Path, out: Path) -> int:
    return main(["decompress", str(folder), str(out), "--original", str(original), "--quiet"])


def test_original_with_other_shapes_than_the_manifest_is_refused(
    made: Path, tmp_path: Path, capsys: Capture
) -> None:
    # Bug caught: matrices of the original's shapes, exit 0.
    other = make_model(tmp_path / "o", transposed(TENSORS), tie_word_embeddings=False)
    assert decompress(made, other, tmp_path / "t") == 2
    line = only_line(capsys.readouterr().err)
    assert f"{other}: {UP} is [64, 32], and [32, 64] in {made / MANIFEST_FILE}" in line
    assert line.endswith("Give that one, or leave out --original.")
    assert not (tmp_path / "t").exists()
    assert decompress(made, tmp_path / "bf16", tmp_path / "t") == 0
    assert main(["decompress", str(made), str(tmp_path / "u"), "--quiet"]) == 0
    assert main(["verify", str(tmp_path / "t"), "--against", str(tmp_path / "bf16")]) == 0


def test_original_with_other_shapes_than_the_config_is_refused(
    bf16_checkpoint: Checkpoint, tmp_path: Path, capsys: Capture
) -> None:
    bf16_folder = bf16_checkpoint("llama-tiny")
    other = Path(shutil.copytree(bf16_folder, tmp_path / "o"))
    tensors = transposed(load_file(other / "model.safetensors"))
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    assert decompress(LLAMA, other, tmp_path / "t") == 2
    line = only_line(capsys.readouterr().err)
    assert f"in {LLAMA / 'config.json'}; expected the original of this checkpoint" in line
    assert decompress(LLAMA, bf16_folder, tmp_path / "t") == 0


def test_original_that_is_a_dfloat11_checkpoint_or_the_config_of_one_is_refused(
    made: Path, tmp_path: Path, capsys: Capture
) -> None:
    for original in (made, made / "config.json", LLAMA):
        assert decompress(made, original, tmp_path / "t") == 2
        line = only_line(capsys.readouterr().err)
        assert line.startswith(f"vllm-dfloat: {original}: is a DFloat11 checkpoint")
        assert "expected the BF16 original" in line
    assert not (tmp_path / "t").exists()


def test_original_alone_tells_the_shapes_where_nothing_else_does(
    made: Path, tmp_path: Path
) -> None:
    (made / MANIFEST_FILE).unlink()
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "model_type": "nobody-knows-it"}))
    assert decompress(made, tmp_path / "bf16", tmp_path / "t") == 0
    assert main(["verify", str(tmp_path / "t"), "--against", str(tmp_path / "bf16")]) == 0
