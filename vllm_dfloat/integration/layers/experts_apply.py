"""The subclass of vLLM's class of experts that runs on compressed ones.

Most tokens: decode, then vLLM's kernel as it is. Few, in modes `fused` and `fused-exact`: of each of the two products
it is decided, by what is known on the host, whether it is computed without decoding, so a captured CUDA graph is right
whatever the router chooses. All between the products is vLLM's.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from vllm_dfloat.device.fast_expert_product import Routed
from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.integration.layers import experts_product
from vllm_dfloat.integration.layers.experts_kernel import HELD, HeldExperts, Tensor3, Undecoded
from vllm_dfloat.integration.layers.experts_product import RoutedProduct, frozen, is_plain
from vllm_dfloat.integration.layers.layouts import BY_NAME
from vllm_dfloat.integration.seam import expert_products

_HOW = (
    "expected vLLM's class of experts to multiply by w13 and w2 as it got them, since they are not decoded otherwise. "
    "Set mode to 'exact'."
)
_PART = "dfloat11_part"  # the attribute of a tensor in the scratch that holds its Part


@functools.cache
def decoding(kernel: type) -> type:
    """Return a subclass of one of vLLM's classes of experts whose `apply` runs on compressed weights.

    Every other argument goes on untouched. Of the class's own name only the end differs, for vLLM's log.
    """
    product = expert_products.product_of(kernel)
    multiplying = None
    if product is not None:
        multiplying = expert_products.apply_with(kernel, _choosing(product))

    def apply(self: Any, *, w1: torch.Tensor, w2: torch.Tensor, **arguments: Any) -> Any:
        held: HeldExperts = getattr(self, HELD)
        ids = arguments.get("topk_ids")
        if ids is None:  # a kernel that routes by itself
            ids = arguments["router_logits"]
        if multiplying is not None and _may_multiply(held, arguments):
            return _multiply(multiplying, self, held, arguments)
        w13, w2 = held.decoded(ids, arguments.get("expert_map"))
        return kernel.apply(self, w1=w13, w2=w2, **arguments)  # type: ignore[attr-defined]

    return type(f"DFloat11{kernel.__name__}", (kernel,), {"apply": apply})


def _may_multiply(held: HeldExperts, arguments: dict[str, Any]) -> bool:
    most = max(held.most_tokens)
    return 0 < len(arguments["hidden_states"]) <= most and not torch.compiler.is_compiling()


def _multiply(
    apply: Callable[..., Any], kernel: Any, held: HeldExperts, arguments: dict[str, Any]
) -> Any:
    """Call the copy of vLLM's `apply` whose products are ours, with tensors that are not decoded yet."""
    room = Undecoded(held, arguments["topk_ids"], arguments["expert_map"])
    tokens, per_token = arguments["topk_ids"].shape
    parts = [
        Part(room, tensor, tokens if tokens <= most else 0, per_token)
        for tensor, most in zip((held.w13, held.w2), held.most_tokens, strict=True)
    ]
    w13, w2 = (part.take() for part in parts)
    result = apply(kernel, w1=w13, w2=w2, **arguments)
    if not all(part.is_used for part in parts):
        raise UnsupportedError(
            f"{expert_products.NAME}: it was not called with both tensors; {_HOW}"
        )
    return result


class Part:
    """One of a layer's two tensors in one call of its kernel.

    Attributes:
        tokens: of the layer; 0 if the tensor is decoded in any case.
        is_used: whether it was multiplied by.
    """

    def __init__(self, room: Undecoded, of: Tensor3, tokens: int, per_token: int) -> None:
        self._room, self._of, self.tokens, self._per_token = room, of, tokens, per_token
        self.is_used = False

    def take(self) -> torch.Tensor:
        """Return the tensor's room in the scratch, not decoded, which knows this object.

        It is not known here: a cycle would keep the scratch and the router's ids until Python's collector runs.
        """
        tensor = self._room.room(self._of)
        setattr(tensor, _PART, self)
        return tensor

    def decode(self) -> None:
        """Write the weights of the experts that got tokens to the scratch."""
        self._room.decoded(self._of)

    def product(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        routed: Routed,
        config: Mapping[str, Any],
    ) -> RoutedProduct:
        """Return what a product's bits depend on."""
        _, rows, cols = self._of.sizes
        return RoutedProduct(
            x.device, rows, cols, self._room.held.layout, self._room.held.mode, self._per_token, routed.top_k,
            routed.weights is not None, None if bias is None else bias.dtype, routed.ids is not None, frozen(config),
        )  # fmt: skip

    def multiply(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        routed: Routed,
        config: Mapping[str, Any],
        out: torch.Tensor,
    ) -> bool:
        """Multiply without decoding, if that is settled for this product; return whether it was done."""
        of = BY_NAME[self._room.held.layout].experts_product
        if of is None or not self.tokens or not is_plain(x, bias, routed, out):
            return False
        if self.tokens not in experts_product.known.get(
            self.product(x, bias, routed, config), frozenset()
        ):
            return False
        of.launch(x, self._of.desc, *self._of.sizes, routed, bias, out)
        return True


def _choosing(product: Callable[..., None]) -> Callable[..., None]:
    """Return what a copy of vLLM's `apply` calls in place of vLLM's product, with the arguments of the latter."""

    def choose(
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        A_scale: torch.Tensor | None,
        B_scale: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        sorted_token_ids: torch.Tensor | None,
        expert_ids: torch.Tensor,
        num_tokens_post_padded: torch.Tensor,
        mul_routed_weight: bool,
        top_k: int,
        config: dict[str, Any],
        **others: Any,
    ) -> None:
        part: Part | None = getattr(B, _PART, None)
        if part is None:
            raise UnsupportedError(
                f"{expert_products.NAME}: its weights are another tensor; {_HOW}"
            )
        part.is_used = True
        weights = (
            topk_weights.reshape(-1) if topk_weights is not None and mul_routed_weight else None
        )
        routed = Routed(
            sorted_token_ids, num_tokens_post_padded, expert_ids, config["BLOCK_SIZE_M"], part.tokens, top_k, weights,
        )  # fmt: skip
        if part.multiply(A, others.get("B_bias"), routed, config, C):
            return
        part.decode()
        product(
            A, B, C, A_scale, B_scale, topk_weights, sorted_token_ids, expert_ids, num_tokens_post_padded,
            mul_routed_weight, top_k, config, **others,
        )  # fmt: skip

    return choose
