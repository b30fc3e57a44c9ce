"""Which tokens go to which experts, in the form of vLLM's own kernel for BF16 experts."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Routed:
    """Which rows of a result are which expert's.

    Attributes:
        ids: int32 [blocks * block], for each place of a block a row of the result, or a larger number for none; None if
            block i is row i of the result alone.
        num_padded: int32 [1], so many elements of `ids` count; None without them.
        expert_of_block: int32 or int64 [blocks]; negative for none, whose rows become 0.
        block: places of a block.
        num_tokens: of the layer's input; a block holds no more, if the experts of a token are different ones.
        top_k: rows of the result per row of activations.
        weights: FP32 or BF16, as many as rows of the result, by which these are multiplied before rounding, or None.
    """

    ids: torch.Tensor | None
    num_padded: torch.Tensor | None
    expert_of_block: torch.Tensor
    block: int
    num_tokens: int
    top_k: int
    weights: torch.Tensor | None
