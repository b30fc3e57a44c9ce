"""The op `vllm_dfloat::lookup`: rows of a compressed embedding, in a form that Inductor fuses like BF16 vLLM's.

BF16 vLLM looks rows up with `F.embedding(ids, weight)`. Inductor does not run this alone: it gathers the rows again in
every kernel that uses them. The result of an opaque op is a buffer instead. A buffer counts as one read, a gather as
two. With a buffer, Inductor would store the residual stream after another layer and add the squares of a norm in
another order, and answers would differ in the last bit. So a compiled model gathers too: the op returns the rows and an
index 0, 1, 2, ..., and for `F.embedding(index, rows)` Inductor makes the same kernels as for BF16 vLLM.
"""

from collections.abc import Callable

import torch

from vllm_dfloat.integration.layers.layouts import BY_NAME
from vllm_dfloat.integration.layers.registration import register

INDEX_DTYPE = torch.int32  # as vLLM's token ids


def look_up(
    desc: torch.Tensor, ids: torch.Tensor, rows: int, cols: int, layout: str
) -> torch.Tensor:
    """Return BF16 [n, cols]: row i is row ids[i] of the weight [rows, cols] that `desc` describes.

    Args:
        ids: int64 [n].
        layout: how the weight is held, a name in layouts.py.
    """
    if not torch.compiler.is_compiling():
        return BY_NAME[layout].lookup(desc, ids, rows, cols)
    table, index = op(desc, ids, rows, cols, layout)
    return torch.nn.functional.embedding(index.long(), table)


def _lookup(
    desc: torch.Tensor, ids: torch.Tensor, rows: int, cols: int, layout: str
) -> tuple[torch.Tensor, torch.Tensor]:
    table = BY_NAME[layout].lookup(desc, ids, rows, cols)
    return table, torch.arange(ids.numel(), dtype=INDEX_DTYPE, device=ids.device)


def _lookup_fake(
    desc: torch.Tensor, ids: torch.Tensor, rows: int, cols: int, layout: str
) -> tuple[torch.Tensor, torch.Tensor]:
    table = desc.new_empty((ids.shape[0], cols), dtype=torch.bfloat16)
    return table, ids.new_empty((ids.shape[0],), dtype=INDEX_DTYPE)


op: Callable[..., tuple[torch.Tensor, torch.Tensor]] = register(
    "lookup(Tensor desc, Tensor ids, int rows, int cols, str layout) -> (Tensor, Tensor)",
    _lookup,
    _lookup_fake,
)
