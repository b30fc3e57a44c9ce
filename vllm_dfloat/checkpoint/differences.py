"""How a decoded tensor differs from an original one, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vllm_dfloat.checkpoint.tied import is_lm_head, may_be_embedding
from vllm_dfloat.codec.arrays import Bits
from vllm_dfloat.storage.pieces import read_pieces
from vllm_dfloat.storage.stored_tensor import StoredTensor

_PIECE_BYTES = 4 << 20


def difference(dtype: str, bits: Bits, original: StoredTensor) -> str:
    """Return what differs, "" if nothing does; reads the original in pieces.

    Args:
        dtype: safetensors name of the dtype of `bits`.
        bits: a tensor, BF16 as uint16.
        original: what it should be.
    """
    if dtype != original.dtype or bits.shape != original.shape:
        return f"{dtype}{list(bits.shape)} against {original.dtype}{list(original.shape)}"
    size, at, wrong, first = bits.dtype.itemsize, 0, 0, ""
    flat = np.ascontiguousarray(bits).reshape(-1).view(np.uint8)
    for piece in read_pieces(original, _PIECE_BYTES):
        right = piece.view(np.uint8)
        left = flat[at : at + right.size]
        if not np.array_equal(left, right):
            found = np.flatnonzero((left != right).reshape(-1, size).any(axis=1))
            wrong += found.size
            begin = int(found[0]) * size
            words = [part[begin : begin + size][::-1].tobytes().hex() for part in (left, right)]
            first = first or f"{at // size + found[0]}: {words[0]} against {words[1]}"
        at += right.size
    return f"{wrong} of {bits.size} elements differ, the first at {first}" if wrong else ""


def lone_head_difference(
    dtype: str, bits: Bits, originals: Mapping[str, StoredTensor], other: Path
) -> str:
    """Return how a tensor of an LM head differs from the embedding, "" if it is that to the bit.

    Args:
        dtype, bits: the tensor, which one of two folders has.
        originals: the tensors of the BF16 model.
        other: the folder that has no such tensor, and so the embedding for its LM head.
    """
    found = "the model has none of that shape"
    for name, embedding in embeddings(originals).items():
        what = difference(dtype, bits, embedding)
        if not what:
            return ""
        if embedding.shape == bits.shape:
            found = f"{name}: {what}"
    return f"not in {other}, where the embedding takes its place, and it is not equal to that ({found})"


def embeddings(originals: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the matrices that may be the embedding of the tokens, the largest first."""
    found = [
        name
        for name, tensor in originals.items()
        if may_be_embedding(name) and not is_lm_head(name) and len(tensor.shape) == 2
    ]
    found.sort(key=lambda name: -math.prod(originals[name].shape))
    return {name: originals[name] for name in found}
