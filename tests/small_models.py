"""Models of a few tensors, for tests of files."""

import json
import math
from pathlib import Path

import torch
from helpers import gaussian
from safetensors.torch import save_file


def bf16(*shape: int, seed: int = 0) -> torch.Tensor:
    bits = gaussian(math.prod(shape[:-1]), shape[-1], seed)
    return torch.from_numpy(bits.reshape(shape)).view(torch.bfloat16)


def make_model(path: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    path.mkdir()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return path
