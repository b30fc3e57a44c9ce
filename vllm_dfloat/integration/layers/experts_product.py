"""Products of a few tokens with the compressed experts of a mixture, without decoding: modes `fused` and `fused-exact`.

The product takes the columns in order, 16 at a time, into one sum (device/fast_expert_product.py). Which products are
used is settled after loading (proven_experts.py), in mode `fused-exact` by a comparison with vLLM's own.
"""

import os
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vllm_dfloat.device.fast_expert_product import Routed
from vllm_dfloat.integration.layers.layouts import BY_NAME

ALIGNMENT = 16  # bytes, of operands and result: as much as Triton knows of an address

Config = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class RoutedProduct:
    """A product with one tensor of a layer's experts, as far as its bits depend on it; the tokens come on top.

    Attributes:
        device: where it is computed.
        rows, cols: shape of an expert.
        layout: how the experts are held, a name in layouts.py.
        mode: the mode in which it is used.
        per_token: experts of a token.
        top_k: rows of the result for each row of activations: `per_token` for w13, 1 for w2.
        weighs: whether results are multiplied by the router's weights.
        bias: dtype of the biases; None without them.
        is_sorted: whether tokens are sorted by experts in blocks; else each has a block.
        config: launch parameters of vLLM's product, in order of their names.
    """

    device: torch.device
    rows: int
    cols: int
    layout: str
    mode: str
    per_token: int
    top_k: int
    weighs: bool
    bias: torch.dtype | None
    is_sorted: bool
    config: Config

    @property
    def block(self) -> int:
        """Tokens of a block, if they are sorted."""
        return dict(self.config)["BLOCK_SIZE_M"] if self.is_sorted else 1

    @property
    def form(self) -> Hashable:
        """What, beside a variant, tells its kernel from others."""
        return self.weighs, self.bias, self.is_sorted

    def facts(self) -> dict[str, Any]:
        """Return, as JSON, all that its bits depend on beside the device and the libraries."""
        of = BY_NAME[self.layout].experts_product
        ours = {} if of is None else of.facts()
        variables = {k: v for k, v in sorted(os.environ.items()) if k.startswith("VLLM_TRITON_")}
        return ours | {
            "experts": [self.rows, self.cols],
            "layout": self.layout,
            "per token": [self.per_token, self.top_k],
            "weighs": self.weighs,
            "bias": str(self.bias),
            "sorted": self.is_sorted,
            "config": [list(entry) for entry in self.config],
            "of vllm": variables,
        }

    def variants(self, most: int) -> Mapping[Hashable, int]:
        """Return the kernels for up to `most` tokens, and for each a number of tokens that uses it."""
        of = BY_NAME[self.layout].experts_product
        return {} if of is None else of.variants(self.block, most)


known: dict[RoutedProduct, frozenset[int]] = {}  # the numbers of tokens at which it is used


def frozen(config: Mapping[str, Any]) -> Config:
    """Return launch parameters in the form of `RoutedProduct.config`."""
    return tuple(sorted(config.items()))


def is_plain(x: torch.Tensor, bias: torch.Tensor | None, routed: Routed, out: torch.Tensor) -> bool:
    """Return whether operands and result are as those of proofs, for which kernels were compiled after loading.

    Other dtypes and addresses would compile other kernels while requests wait, or in a capture.
    """
    if not x.dtype == out.dtype == torch.bfloat16 or x.dim() != 2:
        return False
    if routed.weights is not None and routed.weights.dtype != torch.float32:
        return False
    if routed.expert_of_block.dtype != torch.int32:
        return False
    tensors = [tensor for tensor in (x, out, bias, routed.weights) if tensor is not None]
    return all(tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0 for tensor in tensors)
