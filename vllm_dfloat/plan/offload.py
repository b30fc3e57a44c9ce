"""vLLM's offload: how many bytes of a rank's weights lie in host memory, in BF16 and compressed."""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_dfloat.errors import UnsupportedError

GROWTH_SHARE = 64  # one part of so many of the budget is left for weights that grow in an update
SPARE = 256  # and of a buffer


@dataclass(frozen=True)
class BlockWeight:
    """A weight of a transformer block; vLLM offloads no others.

    Attributes:
        name: in the block, such as "self_attn.qkv_proj".
        turn: number of the block among those of its pipeline stage; -1 in a tower.
        bf16, dfloat11: its bytes on the rank.
        is_compressed: whether it is held compressed.
        is_vector: a norm or a bias.
    """

    bf16: int
    dfloat11: int
    is_compressed: bool
    is_vector: bool
    name: str = ""
    turn: int = -1


@dataclass(frozen=True)
class Prefetch:
    """vLLM's options of prefetching offload, by their names there.

    Attributes:
        group_size: blocks of a group; 0 for no such offload.
        num_in_group: how many of them, the last, lie in host memory.
        step: buffers for each name of a parameter.
        params: whole segments of names, one of which a parameter must have; none for all parameters.
    """

    group_size: int = 0
    num_in_group: int = 1
    step: int = 1
    params: frozenset[str] = frozenset()

    def check(self) -> None:
        """Raise UnsupportedError where vLLM refuses these numbers."""
        if self.group_size < 0:
            raise UnsupportedError(f"--offload-group-size {self.group_size}: expected at least 0.")
        if self.step < 1:
            raise UnsupportedError(f"--offload-prefetch-step {self.step}: expected at least 1.")
        if self.num_in_group < 1 or (self.group_size and self.num_in_group > self.group_size):
            raise UnsupportedError(
                f"--offload-num-in-group {self.num_in_group}: expected 1 to --offload-group-size, "
                f"{self.group_size}."
            )

    def takes(self, weight: BlockWeight) -> bool:
        """Return whether a weight is among those that vLLM's rule names."""
        if not self.group_size or weight.turn < 0:
            return False
        leaf = weight.name.rpartition(".")[2]
        name = weight.name if leaf.endswith("_weight") else f"{weight.name}.weight"
        named = any(f".{segment}." in f".{name}." for segment in self.params) or not self.params
        return named and weight.turn % self.group_size >= self.group_size - self.num_in_group


NO_PREFETCH = Prefetch()


@dataclass(frozen=True)
class OnHost:
    """Bytes of a rank's weights in host memory, and of the buffers on its GPU into which they are copied."""

    bf16: int
    dfloat11: int
    bf16_buffers: int = 0
    dfloat11_buffers: int = 0


def on_host(weights: Sequence[BlockWeight], budget: int, prefetch: Prefetch) -> OnHost:
    """Return what lies in host memory; budget: of --cpu-offload-gb, which vLLM ignores with prefetching offload."""
    if not prefetch.group_size:
        return OnHost(bf16_on_host(weights, budget), dfloat11_on_host(weights, budget))
    chosen = [weight for weight in weights if prefetch.takes(weight)]
    moved = [weight for weight in chosen if weight.is_compressed]  # all else stays on the GPU
    of_bf16 = {(weight.name, weight.bf16) for weight in chosen}  # vLLM has one for each shape
    largest: dict[str, int] = {}
    for weight in moved:
        largest[weight.name] = max(largest.get(weight.name, 0), weight.dfloat11)
    return OnHost(
        sum(weight.bf16 for weight in chosen),
        sum(weight.dfloat11 for weight in moved),
        prefetch.step * sum(size for _, size in of_bf16),
        prefetch.step * sum(size + size // SPARE for size in largest.values()),
    )


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
