"""The bits per weight of the codes of stored weights, from a sample of each."""

import math

import numpy as np

from vllm_dfloat.codec.arrays import Bits, I64Array, U16Array
from vllm_dfloat.codec.huffman import NUM_SYMBOLS
from vllm_dfloat.codec.layout import SYMBOL_SHIFT
from vllm_dfloat.plan.layout_sizes import ASSUMED_ESCAPES, share_of_escapes
from vllm_dfloat.plan.packed_size import ASSUMED_CODE_BITS, mean_code_bits
from vllm_dfloat.plan.stored import DTYPES, Files
from vllm_dfloat.plan.weights import Weight
from vllm_dfloat.storage.stored_tensor import StoredTensor

Counts = I64Array

CHUNK, CHUNKS = 1 << 16, 16  # weights read of each tensor: 16 runs, evenly spread


class MeasuredBits:
    """The bits per weight of a weight's codes, from a sample of its tensors; for a compressed weight, of its unit.

    Float16 and float32 are measured after conversion to BF16, as vLLM does it. If nothing can be measured, a value is
    assumed.
    """

    def __init__(self, files: Files) -> None:
        self._files = files
        self._counts: dict[str, Counts] = {}

    def __call__(self, weight: Weight) -> float:
        counts = self._counts_of(weight)
        if counts is not None:
            counts[0] += weight.padding  # zeros
            return mean_code_bits(counts)
        name = weight.name
        while name:
            if name in self._files.code_bits:
                return self._files.code_bits[name]
            name = name.rpartition(".")[0]
        return ASSUMED_CODE_BITS

    def escapes(self, weight: Weight) -> float:
        """Return the share of a weight's values outside its best 16 exponents."""
        counts = self._counts_of(weight)
        if counts is None:
            return ASSUMED_ESCAPES
        counts[0] += weight.padding
        return share_of_escapes(counts)

    def _counts_of(self, weight: Weight) -> Counts | None:
        """Return the exponents of all tensors of a weight, extrapolated from the samples."""
        total = np.zeros(NUM_SYMBOLS, np.int64)
        for name in weight.stored:
            tensor = self._files.tensors.get(name)
            if tensor is None or tensor.dtype not in DTYPES:
                return None
            if name not in self._counts:
                self._counts[name] = _count(tensor)
            share = math.prod(tensor.shape) / max(1, int(self._counts[name].sum()))
            total += np.rint(self._counts[name] * share).astype(np.int64)
        return total


def _count(tensor: StoredTensor) -> Counts:
    """Return how often each exponent occurs in a sample of a tensor, as BF16: int64 [256]."""
    flat = tensor.bits().reshape(-1)
    if flat.size > CHUNK * CHUNKS:
        step = (flat.size - CHUNK) // (CHUNKS - 1)
        flat = np.concatenate([flat[i * step : i * step + CHUNK] for i in range(CHUNKS)])
    bits = flat if tensor.dtype == "BF16" else to_bf16(flat)
    return np.bincount(bits >> SYMBOL_SHIFT & 0xFF, minlength=NUM_SYMBOLS)


def to_bf16(values: Bits) -> U16Array:
    """Return float16 or float32 numbers as the bits of BF16, rounded to the nearest, ties to even, as torch does."""
    with np.errstate(invalid="ignore"):  # signalling NaNs
        bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(is_nan, 0x7FC0, rounded).astype(np.uint16)
