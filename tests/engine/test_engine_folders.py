"""Unusual folders are served as by BF16 vLLM, or refused in a sentence that says what is wrong."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
from conftest import Checkpoint
from engines import answers, bf16_answers, engine
from safetensors.torch import load_file, save_file

from vllm_dfloat.checkpoint.folder import COMPRESS_JOURNAL
from vllm_dfloat.errors import FormatError

pytestmark = pytest.mark.engine

Q, K, V = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv")


def shards_that_repeat(
    source: Path,
    folder: Path,
    change: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
) -> Path:
    """Write a model in three files: V is in two of them, so that qkv_proj's number of elements is reached before K."""
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    tensors = load_file(source / "model.safetensors")
    rest = {name: tensor for name, tensor in tensors.items() if name not in (Q, K)}
    parts = [{Q: tensors[Q], V: tensors[V]}, {**rest, V: change(tensors[V])}, {K: tensors[K]}]
    for number, part in enumerate(parts, 1):
        save_file(part, folder / f"model-{number:05}-of-00003.safetensors", {"format": "pt"})
    return folder


def add_hidden_files(folder: Path) -> None:
    for file in list(folder.iterdir()):
        (folder / f"._{file.name}").write_bytes(b"\x00\x05\x16\x07" + b"\0" * 4092)


def test_repeated_tensors_and_hidden_files_are_served_as_by_bf16_vllm(
    bf16_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    # Bug caught: V counted twice, so qkv_proj was taken for complete, and K was written after it was compressed.
    model = shards_that_repeat(bf16_checkpoint("llama"), tmp_path / "model")
    add_hidden_files(model)
    assert answers(model, quantization="dfloat11") == bf16_answers(bf16_checkpoint("llama"))


def test_an_official_checkpoint_is_served_whatever_lies_hidden_in_it_and_whatever_its_index_says(
    bf16_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    # Bug caught: a ._ file was read as weights; vLLM refused the original's index, whose files are not there.
    model = Path(shutil.copytree(tiny_models.official("llama-tiny"), tmp_path / "model"))
    add_hidden_files(model)
    (model / "model.safetensors.index.json").write_text(
        '{"weight_map": {"lm_head.weight": "model-00001-of-00004.safetensors"}}'
    )
    assert answers(model) == bf16_answers(bf16_checkpoint("llama-tiny"))


def differing_shards(whole: Path, folder: Path) -> Path:
    return shards_that_repeat(whole, folder, lambda tensor: tensor * 2)


def without_a_layer(whole: Path, folder: Path) -> Path:
    shutil.copytree(tiny_models.official("llama-tiny"), folder)
    (folder / "model_layers_1.safetensors").unlink()
    return folder


def unfinished(whole: Path, folder: Path) -> Path:
    shutil.copytree(tiny_models.official("llama-tiny"), folder)
    (folder / COMPRESS_JOURNAL).write_text("{}\n")
    (folder / "config.json").unlink()
    return folder


def unfinished_over_another(whole: Path, folder: Path) -> Path:
    shutil.copytree(whole, folder)
    (folder / COMPRESS_JOURNAL).write_text("{}\n")
    return folder


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (differing_shards, r"model-00002-of-00003\.\w+: .*v_proj.*model-00001-of-00003\.safetensors"),
        (without_a_layer, r"no tensor of model\.layers\.1, .* A weight file is missing"),
        (unfinished, r"unfinished: .* Run vllm-dfloat compress SOURCE .* again"),
        (unfinished_over_another, r"unfinished: .* Run vllm-dfloat compress SOURCE .* again"),
    ],
)  # fmt: skip
def test_a_folder_that_holds_no_whole_model_is_refused(
    make: Callable[[Path, Path], Path], told: str, bf16_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    model = make(bf16_checkpoint("llama"), tmp_path / "model")
    with pytest.raises(FormatError, match=told), engine(model, quantization="dfloat11"):
        pass
