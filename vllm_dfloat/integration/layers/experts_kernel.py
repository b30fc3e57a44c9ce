"""Between vLLM's kernel for routed experts and the compressed weights: decode, then call the kernel as it is.

A layer's two tensors lie decoded behind one another in a slot of the scratch, and after them one flag per expert. Only
experts that got tokens are decoded where the kernel reads no others. The place of the hook, the kernel's own `apply`,
is the only one that sees the ids of all tokens: with data and expert parallelism they are gathered just before, and
LoRA has a method of its own that calls the kernel.
"""

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_dfloat.codec.layout import TILE_WEIGHTS
from vllm_dfloat.device import experts, ops
from vllm_dfloat.device.scratch import scratch
from vllm_dfloat.integration.layers.layouts import BY_NAME
from vllm_dfloat.integration.layers.registration import register
from vllm_dfloat.integration.seam import slots

HELD = "dfloat11"  # the attribute of a kernel's object that holds its HeldExperts


@dataclass(frozen=True)
class Tensor3:
    """One tensor of experts, [experts, rows, cols] to the decoder.

    Attributes:
        desc: its descriptor.
        shape: as the kernel wants it; the first dimension are the experts.
    """

    desc: torch.Tensor
    shape: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Experts, rows of one, and columns."""
        num_experts, *rows, cols = self.shape
        return num_experts, functools.reduce(int.__mul__, rows, 1), cols

    @property
    def numel(self) -> int:
        """Elements, without padding."""
        num_experts, rows, cols = self.sizes
        return num_experts * rows * cols

    def scratch_numel(self, layout: str) -> int:
        """Elements of the scratch that it needs, held in a layout of layouts.py."""
        num_experts, rows, cols = self.sizes
        return BY_NAME[layout].scratch_numel(num_experts * rows, cols)


@dataclass(frozen=True)
class HeldExperts:
    """What a kernel needs to know of a layer's compressed experts.

    Attributes:
        w13, w2: the two tensors.
        layout: how they are held, a name in layouts.py.
        decodes_all: whether experts without tokens are decoded too.
        check: raises if other code has replaced the layer's parameters.
    """

    w13: Tensor3
    w2: Tensor3
    layout: str
    decodes_all: bool
    check: Callable[[], None]

    @property
    def scratch_numel(self) -> int:
        """Elements of the scratch that the layer needs: both tensors and the flags, in whole tiles."""
        flags = ops.padded_numel(1, 2 * self.w13.shape[0])  # an int32 takes the room of two weights
        return sum(tensor.scratch_numel(self.layout) for tensor in (self.w13, self.w2)) + flags

    def decoded(
        self, ids: torch.Tensor, expert_map: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return w13 and w2 in BF16, valid until the next layer is decoded on this stream.

        Args:
            ids: the global ids of the experts that got tokens, of any shape. Where all are decoded, any tensor that
                the layer's input leads to.
            expert_map: as vLLM gives it to kernels.
        """
        if torch.compiler.is_compiling():
            return self._traced(self.w13, ids, expert_map), self._traced(self.w2, ids, expert_map)
        self.check()
        memory, status = scratch.take(ids.device, self.scratch_numel, slots.slot(ids.device))
        middle = self.w13.scratch_numel(self.layout)
        end = middle + self.w2.scratch_numel(self.layout)
        chosen = None
        if not self.decodes_all:
            chosen = memory[end:].view(torch.int32)[: self.w13.shape[0]]
            experts.mark_chosen(ids, expert_map, chosen)
        tiles = middle // TILE_WEIGHTS
        w13 = _decode(self.w13, self.layout, chosen, memory[:middle], status[:tiles])
        w2 = _decode(self.w2, self.layout, chosen, memory[middle:end], status[tiles:])
        return w13, w2

    def _traced(
        self, tensor: Tensor3, ids: torch.Tensor, expert_map: torch.Tensor | None
    ) -> torch.Tensor:
        return op(tensor.desc, ids, expert_map, list(tensor.shape), self.layout, self.decodes_all)


def _decode(
    tensor: Tensor3,
    layout: str,
    chosen: torch.Tensor | None,
    out: torch.Tensor,
    status: torch.Tensor,
) -> torch.Tensor:
    num_experts, rows, cols = tensor.sizes
    held = BY_NAME[layout]
    if chosen is None or held.decode_chosen is None:
        held.decode(tensor.desc, num_experts * rows, cols, out, status)
    else:
        held.decode_chosen(tensor.desc, num_experts, rows, cols, chosen, out, status)
    return out[: tensor.numel].view(tensor.shape)


def _decode_anew(
    desc: torch.Tensor,
    ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    shape: Sequence[int],
    layout: str,
    decodes_all: bool,
) -> torch.Tensor:
    """Decode into new memory, for traced graphs, as vLLM traces its kernels for experts on a CPU.

    An op must not return what its next call overwrites. Since it takes the ids, no layer is decoded before its router
    has run, so a graph holds one layer of experts at a time.
    """
    tensor = Tensor3(desc, tuple(shape))
    numel = tensor.scratch_numel(layout)
    out = torch.empty(numel, dtype=torch.bfloat16, device=desc.device)
    status = torch.empty(numel // TILE_WEIGHTS, dtype=torch.int32, device=desc.device)
    chosen = None
    if not decodes_all:
        chosen = torch.empty(tensor.shape[0], dtype=torch.int32, device=desc.device)
        experts.mark_chosen(ids, expert_map, chosen)
    return _decode(tensor, layout, chosen, out, status)


def _decode_anew_fake(
    desc: torch.Tensor,
    ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    shape: Sequence[int],
    layout: str,
    decodes_all: bool,
) -> torch.Tensor:
    return desc.new_empty(list(shape), dtype=torch.bfloat16)


op: Callable[..., torch.Tensor] = register(
    "experts(Tensor desc, Tensor ids, Tensor? expert_map, int[] shape, str layout, bool decodes_all) -> Tensor",
    _decode_anew,
    _decode_anew_fake,
)


@functools.cache
def decoding(kernel: type) -> type:
    """Return a subclass of one of vLLM's classes of experts whose `apply` runs on decoded weights.

    Every other argument goes on untouched. Of the class's own name only the end differs, for vLLM's log.
    """

    def apply(self: Any, *, w1: torch.Tensor, w2: torch.Tensor, **arguments: Any) -> Any:
        ids = arguments.get("topk_ids")
        if ids is None:  # a kernel that routes by itself
            ids = arguments["router_logits"]
        w13, w2 = getattr(self, HELD).decoded(ids, arguments.get("expert_map"))
        return kernel.apply(self, w1=w13, w2=w2, **arguments)  # type: ignore[attr-defined]

    return type(f"DFloat11{kernel.__name__}", (kernel,), {"apply": apply})


def checked(layer: torch.nn.Module, check: Callable[[Any], None]) -> Callable[[], None]:
    """Return `check` for a layer, without a reference that would keep the layer alive."""
    reference = weakref.ref(layer)
    return lambda: check(reference())
