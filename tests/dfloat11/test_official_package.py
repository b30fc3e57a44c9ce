"""Compare with the official package, if it is installed: its encoder writes the same tensors as `compress`.

    pip install --no-deps dfloat11==0.5.0 dahuffman==0.4.2    # and "setuptools<81", for pkg_resources

If CuPy is missing, it is stubbed: on import the package loads its GPU decoder with it, which encoding never uses.
"""

import importlib.util
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import Checkpoint
from helpers import bf16_bits
from safetensors.torch import load_file, save_file

from vllm_dfloat.convert.compress import compress
from vllm_dfloat.convert.source import open_source

for needed in ("dfloat11", "dahuffman", "pkg_resources", "accelerate"):
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed", allow_module_level=True)
if importlib.util.find_spec("cupy") is None:
    sys.modules["cupy"] = mock.MagicMock()
official = pytest.importorskip("dfloat11.dfloat11")


def module_of(tensors: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """Return a module with these tensors: 2-D weights in linear layers, everything else as it is."""
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        at = root
        for i, part in enumerate(path):
            if part not in dict(at.named_children()):
                is_linear = i == len(path) - 1 and leaf == "weight" and tensor.dim() == 2
                new = torch.nn.Linear(*tensor.shape[::-1], bias=False) if is_linear else None
                at.add_module(part, new or torch.nn.Module())
            at = getattr(at, part)
        setattr(at, leaf, torch.nn.Parameter(tensor, requires_grad=False))
    return root


def assert_same_tensors(model: Path, folder: Path) -> int:
    """Compress `model` with both; compare all tensors, and return how many units there are."""
    compress(open_source(model), folder / "ours")
    config = json.loads((folder / "ours/config.json").read_text())["dfloat11_config"]
    patterns = config["pattern_dict"]
    tensors = load_file(model / "model.safetensors")
    official.compress_model(
        module_of(tensors), patterns, str(folder / "theirs"), check_correctness=False
    )
    theirs = load_file(folder / "theirs/model.safetensors")
    ours: dict[str, torch.Tensor] = {}
    for file in (folder / "ours").glob("*.safetensors"):
        ours |= load_file(file)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert ours[name].shape == tensor.shape, name
        assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name
    stored = json.loads((folder / "theirs/config.json").read_text())["dfloat11_config"]
    assert stored == config
    return sum(name.endswith(".luts") for name in theirs)


@pytest.mark.parametrize("vector", ["llama-tiny", "qwen3-tiny-tied", "phi3-tiny-fused"])
def test_models_get_the_tensors_that_the_package_writes(
    vector: str, bf16_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    assert assert_same_tensors(bf16_checkpoint(vector), tmp_path) >= 2


@pytest.mark.parametrize("seed", range(6))
def test_random_units_get_the_tensors_that_the_package_writes(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    tensors = {}
    for i in range(4):
        for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")[: 1 + (i + seed) % 3]:
            shape = (int(rng.integers(1, 90)) * 3 + 40, int(rng.integers(50, 120)))
            # Powers spread the exponents: long codes, several tables.
            values = rng.standard_normal(math.prod(shape)) ** rng.integers(1, 7) * 0.02
            bits = bf16_bits(values).reshape(shape)
            tensors[f"h.{i}.{name}.weight"] = torch.from_numpy(bits).view(torch.bfloat16)
    tensors["norm.weight"] = torch.ones(7)
    (tmp_path / "m").mkdir()
    save_file(tensors, tmp_path / "m/model.safetensors")
    (tmp_path / "m/config.json").write_text("{}")
    assert assert_same_tensors(tmp_path / "m", tmp_path) >= 3  # one may have too many tables
