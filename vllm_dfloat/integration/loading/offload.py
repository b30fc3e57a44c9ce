"""The log line of vLLM's offload: how many GiB of which layers lie in host memory."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from vllm_dfloat.checkpoint.names import innermost_block
from vllm_dfloat.integration.seam.names import logger
from vllm_dfloat.integration.seam.offloader import offloader
from vllm_dfloat.integration.seam.prefetcher import PackedPrefetcher
from vllm_dfloat.integration.seam.uva_offloader import GIB


def log_offloaded(host_bytes: int, names: Sequence[str], buffer_bytes: int) -> None:
    """Log what lies in host memory, if vLLM's options ask for offload.

    Args:
        host_bytes: all of it, BF16 matrices included.
        names: the layers whose weights are there.
        buffer_bytes: of the device, into which they are copied ahead of use.
    """
    found = offloader()
    if found is None:
        return
    if not found.num_named:
        logger.warning(
            "dfloat11: %s: vLLM's rule names no compressed weight of this model%s; all are on the device",
            found.given,
            f" with {found.segments}" if found.segments else "",
        )
        return
    how = f"{found.given} counts compressed bytes"
    if isinstance(found, PackedPrefetcher):
        how = f"{found.given}; copied ahead of use into {buffer_bytes} bytes of the device"
    logger.info(
        "dfloat11: %.3f GiB of weights in host memory (%d bytes; %s): %s",
        host_bytes / GIB,
        host_bytes,
        how,
        listed(names) or "nothing",
    )


def listed(names: Iterable[str]) -> str:
    """Return the names of layers in few words: "model.layers.0-2 (qkv_proj, o_proj), model.layers.3 (qkv_proj)"."""
    layers: dict[str, list[str]] = defaultdict(list)
    for name in names:
        block = innermost_block(name)
        layers[block].append(name[len(block) :].lstrip(".") if block else name)
    runs: list[tuple[str, int, int, list[str]]] = []  # path, first and last number, layers
    alone = []
    for block, leaves in layers.items():
        path, _, number = block.rpartition(".")
        if not block:
            alone += leaves
        elif runs and runs[-1][0] == path and runs[-1][2:] == (int(number) - 1, leaves):
            runs[-1] = (path, runs[-1][1], int(number), leaves)
        else:
            runs.append((path, int(number), int(number), leaves))
    texts = [
        f"{path}.{first}{f'-{last}' if last > first else ''} ({', '.join(leaves)})".lstrip(".")
        for path, first, last, leaves in runs
    ]
    return ", ".join(alone + texts)
