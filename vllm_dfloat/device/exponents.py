"""A BF16 matrix as the encoding kernels want it, and how often each exponent occurs in it."""

from types import ModuleType

import numpy as np
import torch

from vllm_dfloat.codec.arrays import I64Array
from vllm_dfloat.codec.huffman import NUM_SYMBOLS
from vllm_dfloat.codec.layout import ALIGNMENT, TILE_WEIGHTS
from vllm_dfloat.errors import DeviceError


def aligned(weight: torch.Tensor) -> torch.Tensor:
    """Return the bits of a matrix as int16 [numel], copied if the kernels cannot load 16 aligned bytes at once."""
    flat = weight.detach().contiguous().view(-1).view(torch.int16)
    is_aligned = flat.data_ptr() % ALIGNMENT == 0 and flat.storage_offset() % 2 == 0
    return flat if is_aligned else flat.clone()


def tiles(flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the full tiles without a copy, and the partial last tile padded with zeros; empty if there is none."""
    body = flat[: flat.numel() // TILE_WEIGHTS * TILE_WEIGHTS]
    rest = flat[body.numel() :]
    if not rest.numel():
        return body, rest
    tail = torch.zeros(TILE_WEIGHTS, dtype=flat.dtype, device=flat.device)
    tail[: rest.numel()] = rest
    return body, tail


def occurrences(
    kernels: ModuleType, body: torch.Tensor, tail: torch.Tensor, numel: int, name: str
) -> I64Array:
    """Return how often each exponent occurs, int64 [256]; waits for the device.

    Args:
        kernels: kernels/encode_count.py.
        body, tail: from `tiles`.
        numel: weights of the matrix.
        name: the tensor's name, for messages.

    Raises:
        DeviceError: the device counted another number of weights.
    """
    counts = torch.zeros(NUM_SYMBOLS, dtype=torch.int64, device=body.device)
    kernels.count_exponents(body, counts)
    kernels.count_exponents(tail, counts)
    found: I64Array = counts.cpu().numpy()
    found[0] -= body.numel() + tail.numel() - numel
    if found.sum() != numel or found.min() < 0:
        raise DeviceError(
            f"{name or 'a weight'}: the device counted {int(np.sum(found))} exponents; expected {numel}, one of "
            "each weight. Its kernels cannot be relied upon: run scripts/gpu_verdict.sh."
        )
    return found
