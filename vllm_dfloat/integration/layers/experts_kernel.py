"""Between vLLM's kernel for routed experts and the compressed weights: decode, then call the kernel as it is.

A layer's two tensors lie decoded behind one another in a slot of the scratch, and after them one flag per expert. Only
experts that got tokens are decoded where the kernel reads no others. The place of the hook, the kernel's own `apply`,
is the only one that sees the ids of all tokens (experts_apply.py): with data and expert parallelism they are gathered
just before, and LoRA has a method of its own that calls the kernel.
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
        mode: a mode of the options.
        most_tokens: up to how many tokens of the layer w13 and w2 may be multiplied without decoding, 0 for never.
    """

    w13: Tensor3
    w2: Tensor3
    layout: str
    decodes_all: bool
    check: Callable[[], None]
    mode: str = "exact"
    most_tokens: tuple[int, int] = (0, 0)

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
        held = Undecoded(self, ids, expert_map)
        return held.decoded(self.w13), held.decoded(self.w2)

    def _traced(
        self, tensor: Tensor3, ids: torch.Tensor, expert_map: torch.Tensor | None
    ) -> torch.Tensor:
        return op(tensor.desc, ids, expert_map, list(tensor.shape), self.layout, self.decodes_all)


class Undecoded:
    """The room of a layer's two tensors in the scratch, in one call of its kernel; each is decoded when asked for."""

    def __init__(
        self, held: HeldExperts, ids: torch.Tensor, expert_map: torch.Tensor | None
    ) -> None:
        """Take the room; the arguments are those of `HeldExperts.decoded`."""
        held.check()
        self.held, self._ids, self._map = held, ids, expert_map
        out, status = scratch.take(ids.device, held.scratch_numel, slots.slot(ids.device))
        self._out, self._status = out, status
        self._chosen: torch.Tensor | None = None

    def room(self, tensor: Tensor3) -> torch.Tensor:
        """Return where the tensor will lie, in its shape; its values are those of other layers until it is decoded."""
        return self._out[self._start(tensor) :][: tensor.numel].view(tensor.shape)

    def decoded(self, tensor: Tensor3) -> torch.Tensor:
        """Decode one of the two tensors, and return it."""
        start = self._start(tensor)
        numel = tensor.scratch_numel(self.held.layout)
        out, status = self._out[start:][:numel], self._status[start // TILE_WEIGHTS :]
        return _decode(tensor, self.held.layout, self._marked(), out, status)

    def _start(self, tensor: Tensor3) -> int:
        return 0 if tensor is self.held.w13 else self.held.w13.scratch_numel(self.held.layout)

    def _marked(self) -> torch.Tensor | None:
        """Return the flags of the experts that got tokens, behind the tensors; None if all are decoded."""
        if self._chosen is None and not self.held.decodes_all:
            end = self._start(self.held.w2) + self.held.w2.scratch_numel(self.held.layout)
            self._chosen = self._out[end:].view(torch.int32)[: self.held.w13.shape[0]]
            experts.mark_chosen(self._ids, self._map, self._chosen)
        return self._chosen


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


def checked(layer: torch.nn.Module, check: Callable[[Any], None]) -> Callable[[], None]:
    """Return `check` for a layer, without a reference that would keep the layer alive."""
    reference = weakref.ref(layer)
    return lambda: check(reference())
