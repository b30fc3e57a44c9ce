"""Weights that are there: shapes checked or taken from the files' headers, and codes measured on a sample of them."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vllm_dfloat.checkpoint.dfloat11 import open_checkpoint
from vllm_dfloat.checkpoint.folder import is_dfloat11, stored_tensors
from vllm_dfloat.checkpoint.listing import weight_files
from vllm_dfloat.checkpoint.plain_model import bf16_tensors
from vllm_dfloat.checkpoint.safetensors_file import StoredTensor
from vllm_dfloat.codec.huffman import NUM_SYMBOLS
from vllm_dfloat.codec.layout import SYMBOL_SHIFT
from vllm_dfloat.errors import FormatError
from vllm_dfloat.plan.config import ModelConfig
from vllm_dfloat.plan.packed_size import ASSUMED_CODE_BITS, mean_code_bits
from vllm_dfloat.plan.weights import Part, Place, Split, Weight

Tensors = Mapping[str, StoredTensor]
Counts = npt.NDArray[np.int64]

CHUNK, CHUNKS = 1 << 16, 16  # weights read of each tensor: 16 runs, evenly spread
BF16 = "BF16"
_BLOCK = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)\.")


def read_tensors(folder: Path) -> dict[str, StoredTensor] | None:
    """Return the tensors in the folder's safetensors files, None if there are no such files; reads headers only.

    Raises:
        FormatError: a damaged file, or a model that is not whole.
    """
    if not weight_files(folder):
        return None
    if not is_dfloat11(folder):
        return bf16_tensors(folder)
    open_checkpoint(folder)  # which refuses one that is not whole
    return stored_tensors(folder)


def check_shapes(weights: list[Weight], tensors: Tensors, folder: Path) -> list[str]:
    """Check that the files hold what the config says; return the names of tensors that the plan leaves out.

    Raises:
        FormatError: a tensor is missing or has another shape.
    """
    expected = {name: shape for weight in weights for name, shape in weight.stored.items()}
    for name, shape in expected.items():
        if name not in tensors:
            raise FormatError(
                f"{folder}: no tensor {name}, which config.json makes {list(shape)}. "
                "A file is missing, or config.json belongs to another model."
            )
        if tensors[name].shape != shape:
            raise FormatError(
                f"{tensors[name].where}: shape {list(tensors[name].shape)}; config.json makes it {list(shape)}. "
                "One of the two belongs to another model."
            )
    return sorted(set(tensors) - set(expected) - {"lm_head.weight"})


def weights_of_files(tensors: Tensors, config: ModelConfig) -> list[Weight]:
    """Return the weights of an architecture that is not known: every matrix is cut evenly over the ranks, by its rows
    where they can be, and every matrix but an expert's is compressed. vLLM may do otherwise with some."""
    weights = []
    for name, tensor in tensors.items():
        if name == "lm_head.weight" and config.tied:
            continue
        rows, cols = _as_matrix(tensor.shape)
        found = _BLOCK.search(name)
        layer = int(found.group(1)) if found else -1
        is_matrix = len(tensor.shape) == 2 and name.endswith(".weight")
        is_vocab = rows == config.vocab and layer < 0
        split: Split = "vocab" if is_vocab else "rows" if is_matrix or "expert" in name else "none"
        weights.append(
            Weight(
                name.removesuffix(".weight"), (Part(rows),), cols, split, _place(name, layer, config),
                layer, is_matrix and "expert" not in name, {name: tensor.shape},
            )
        )  # fmt: skip
    return weights


def _as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return [rows, cols] with the experts of a 3-D tensor side by side, so that each of them is cut."""
    if len(shape) == 3:
        return shape[1], shape[0] * shape[2]
    rows = shape[0] if shape else 1
    return rows, math.prod(shape[1:])


def _place(name: str, layer: int, config: ModelConfig) -> Place:
    if 0 <= layer < config.num_layers and "vis" not in name:
        return "layer"
    if "embed_tokens" in name:
        return "tied" if config.tied else "first"
    return "last" if name in ("lm_head.weight", "model.norm.weight") else "all"


class MeasuredBits:
    """The bits per weight of a weight's codes, from a sample of its tensors; for a compressed one, those of its unit.

    What cannot be measured, tensors that are not BF16, is assumed.
    """

    def __init__(self, folder: Path, tensors: Tensors) -> None:
        self._tensors = tensors
        self._counts: dict[str, Counts] = {}
        self._units: dict[str, float] = {}
        if is_dfloat11(folder):
            for name, unit in open_checkpoint(folder).units.items():
                bits = 8 * unit.fields["encoded_exponent"].num_bytes / max(1, unit.num_weights)
                self._units[name] = bits

    def __call__(self, weight: Weight) -> float:
        name = weight.name
        while name:
            if name in self._units:
                return self._units[name]
            name = name.rpartition(".")[0]
        counts = self._counts_of(weight)
        if counts is None:
            return ASSUMED_CODE_BITS
        counts[0] += weight.padding  # zeros
        return mean_code_bits(counts)

    def _counts_of(self, weight: Weight) -> Counts | None:
        """Return the exponents of all tensors of a weight, extrapolated from the samples."""
        total = np.zeros(NUM_SYMBOLS, np.int64)
        for name in weight.stored:
            tensor = self._tensors.get(name)
            if tensor is None or tensor.dtype != BF16:
                return None
            if name not in self._counts:
                self._counts[name] = _count(tensor)
            share = math.prod(tensor.shape) / max(1, int(self._counts[name].sum()))
            total += np.rint(self._counts[name] * share).astype(np.int64)
        return total


def _count(tensor: StoredTensor) -> Counts:
    """Return how often each exponent occurs in a sample of a BF16 tensor: int64 [256]."""
    flat = tensor.bits().reshape(-1)
    if flat.size > CHUNK * CHUNKS:
        step = (flat.size - CHUNK) // (CHUNKS - 1)
        flat = np.concatenate([flat[i * step : i * step + CHUNK] for i in range(CHUNKS)])
    return np.bincount(flat >> SYMBOL_SHIFT & 0xFF, minlength=NUM_SYMBOLS)
