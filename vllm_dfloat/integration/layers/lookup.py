"""The op `vllm_dfloat::lookup`: rows of a compressed embedding, in a form that Inductor fuses as it fuses BF16 vLLM's.

BF16 vLLM looks rows up with `F.embedding(ids, weight)`, which Inductor does not run by itself: it gathers the rows
again in every kernel that uses them. The result of an opaque op is a buffer instead. It counts as one read where the
gather counts as two, so Inductor stores the residual stream after another layer and adds up the squares of a norm in
another order, and answers part in the last bit. So a compiled model gathers too: the op returns the rows asked for
and an index of them, 0, 1, 2, ..., and `F.embedding(index, rows)` makes of that the same kernels.
"""

from collections.abc import Callable

import torch

from vllm_dfloat.integration.layers.layouts import BY_NAME
from vllm_dfloat.integration.layers.registration import register

INDEX_DTYPE = torch.int32  # as vLLM's token ids


def look_up(
    desc: torch.Tensor, ids: torch.Tensor, rows: int, cols: int, layout: str
) -> torch.Tensor:
    """Return BF16 [n, cols], row i being row ids[i] of the weight [rows, cols] that `desc` describes.

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
