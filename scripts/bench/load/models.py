"""Models of random weights for the measurements of loading, and one rank that loads them in its own process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from bench.serve.model import (
    LLAMA,
    SHAPES,
    BenchError,
    check_room,
    is_complete,
    num_bytes,
    tensor_shapes,
)

from vllm_dfloat.storage.safetensors_write import Item, write_safetensors

PIECE_WEIGHTS = 1 << 24


def random_pieces(shape: tuple[int, ...], seed: int) -> Iterator[np.ndarray]:
    """Yield the BF16 bits of a random matrix N(0, 0.02), or of a vector of ones."""
    numel = int(np.prod(shape))
    if len(shape) == 1:
        yield np.full(numel, 0x3F80, np.uint16)
        return
    rng = np.random.default_rng(seed)
    for first in range(0, numel, PIECE_WEIGHTS):
        values = rng.standard_normal(min(PIECE_WEIGHTS, numel - first), np.float32)
        values *= np.float32(0.02)
        yield (values.view(np.uint32) >> 16).astype(np.uint16)


def write_model(shape: str, layers: int, folder: Path) -> dict[str, Any]:
    """Write random weights of a shape with `layers` transformer blocks, unless they exist; return config.json."""
    config = {**LLAMA, **SHAPES[shape], "num_hidden_layers": layers}
    if is_complete(folder, config):
        return config
    files = list(tensor_shapes(config))
    check_room(folder, int(1.7 * sum(map(num_bytes, files))))
    owners: dict[str, str] = {}
    for number, shapes in enumerate(files):
        name = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        items = [
            Item(tensor, "BF16", size, partial(random_pieces, size, seed))
            for seed, (tensor, size) in enumerate(shapes.items(), len(owners))
        ]
        write_safetensors(folder / name, items, {"format": "pt"})
        owners |= dict.fromkeys(shapes, name)
    index = {"metadata": {"total_size": sum(map(num_bytes, files))}, "weight_map": owners}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return config


def forget(folder: Path) -> int:
    """Drop a folder's weight files from the system's page cache; return their bytes."""
    total = 0
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
        total += file.stat().st_size
    return total


def load_rank(model: Path, *options: str, cold: bool = True) -> dict[str, Any]:
    """Run rank.py in its own process, with `cold` from files that are not cached; return its measurements."""
    file_bytes = forget(model) if cold else 0
    command = [sys.executable, str(Path(__file__).with_name("rank.py")), str(model), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = done.stdout.splitlines()
    if done.returncode or not lines or not lines[-1].startswith("{"):
        raise BenchError(f"{' '.join(command)}: exit {done.returncode}: {done.stdout[-3000:]}")
    return json.loads(lines[-1]) | {"file_bytes": file_bytes}
