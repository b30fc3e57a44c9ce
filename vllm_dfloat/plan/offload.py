"""--cpu-offload-gb: how many bytes of a rank's weights lie in host memory, in BF16 and compressed."""

from collections.abc import Sequence
from dataclasses import dataclass

GROWTH_SHARE = 64  # one part of so many of the budget is left for weights that grow in an update


@dataclass(frozen=True)
class BlockWeight:
    """A weight of a transformer block; vLLM offloads no others.

    Attributes:
        bf16, dfloat11: its bytes on the rank.
        is_compressed: whether it is held compressed.
        is_vector: a norm or a bias.
    """

    bf16: int
    dfloat11: int
    is_compressed: bool
    is_vector: bool


def bf16_on_host(weights: Sequence[BlockWeight], budget: int) -> int:
    """Return the bytes that BF16 vLLM puts into host memory: weights in order, until the budget is reached."""
    total = 0
    for weight in weights:
        if total >= budget:
            break
        total += weight.bf16
    return total


def dfloat11_on_host(weights: Sequence[BlockWeight], budget: int) -> int:
    """Return the bytes that lie in host memory when weights are compressed: within the budget.

    Matrices that stay BF16 are first. Then come compressed ones, up to the first that does not fit.
    """
    total = 0
    for weight in weights:
        is_matrix = not (weight.is_compressed or weight.is_vector)
        if is_matrix and total + weight.bf16 <= budget:
            total += weight.bf16
    limit = budget - budget // GROWTH_SHARE
    for weight in weights:
        if weight.is_compressed:
            if total + weight.dfloat11 > limit:
                break
            total += weight.dfloat11
    return total
