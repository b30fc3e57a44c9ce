"""A model's weights as vLLM holds them: fused from tensors of a checkpoint, and cut for the ranks."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from vllm_dfloat.errors import UnsupportedError

VOCAB_PADDING = 64  # vLLM pads vocabularies to a multiple of this

TOWERS = ("vision_tower.", "vision_model.", "visual.", "multi_modal_projector.")

_EXPERTS = re.compile(r"(?:.*\.)?experts(?=\.)")  # not shared_experts

Split = Literal["rows", "cols", "none", "vocab"]
Place = Literal["layer", "first", "last", "tied", "all"]


@dataclass(frozen=True)
class Part:
    """Rows of a weight that are cut on their own, such as q, k and v of a fused qkv_proj.

    Attributes:
        rows: of all ranks together.
        pieces: the most pieces they can be cut into, such as heads; 0 for as many as rows.
        is_repeated: whether more ranks than pieces hold copies, as for heads of keys and values; else it is an error.
    """

    rows: int
    pieces: int = 0
    is_repeated: bool = True

    def rows_of_rank(self, tp: int) -> int:
        return self.rows // (min(tp, self.pieces) if self.pieces else tp)


@dataclass(frozen=True)
class Weight:
    """One parameter of vLLM's model.

    Attributes:
        name: vLLM's, such as "model.layers.3.self_attn.qkv_proj".
        parts: its rows.
        cols: its columns; 1 for a vector.
        split: how tensor parallelism cuts it; "vocab" is "rows" of a padded vocabulary.
        place: the pipeline stages that hold it: that of its layer, the first, the last, both ends ("tied"), or all.
        layer: number of its transformer block, -1 outside of them.
        is_compressed: whether the plugin compresses it: linear layers, experts, embeddings; not norms and routers.
        stored: the tensors of the checkpoint that it is fused from, with their shapes.
        itemsize: bytes per parameter; 4 for the few that vLLM holds in float32 whatever the model's dtype.
        num_experts: of a tensor of experts, whose columns are those of all experts side by side; else 0.
    """

    name: str
    parts: tuple[Part, ...]
    cols: int = 1
    split: Split = "none"
    place: Place = "layer"
    layer: int = -1
    is_compressed: bool = False
    stored: Mapping[str, tuple[int, ...]] = field(default_factory=dict, hash=False)
    itemsize: int = 2
    num_experts: int = 0

    @property
    def expert_layer(self) -> str:
        """The module of experts that this is a part of, whose tensors are decoded together; empty if there is none."""
        found = _EXPERTS.match(self.name)
        return found.group() if found and self.is_compressed else ""

    @property
    def is_of_tower(self) -> bool:
        """Whether it belongs to a tower for images or sound, or to its projector."""
        return self.name.startswith(TOWERS)

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)

    @property
    def numel(self) -> int:
        """Parameters, as papers count them."""
        return self.rows * self.cols

    @property
    def padding(self) -> int:
        """Zeros that pad a vocabulary, on all ranks together."""
        return -self.rows % VOCAB_PADDING * self.cols if self.split == "vocab" else 0

    def shape_of_rank(self, tp: int, expert_parallel: bool = False, dp: int = 1) -> tuple[int, int]:
        """Return [rows, cols] of each rank, of those with the most experts.

        Args:
            expert_parallel: whether each rank holds whole experts, not a part of each.
            dp: data-parallel engines of `tp` ranks, which share routed experts; of other weights each has its own.

        Raises:
            UnsupportedError: vLLM cannot cut the weight into so many parts.
        """
        if self.split == "none":
            return self.rows, self.cols
        if self.num_experts:
            return self._of_experts(tp, expert_parallel, dp)
        if self.split == "cols":
            self._check(self.cols, tp, "columns")
            return self.rows, self.cols // tp
        if self.split == "vocab":
            padded = self.rows + -self.rows % VOCAB_PADDING
            self._check(padded, tp, "rows")
            return padded // tp, self.cols
        for part in self.parts:
            pieces = min(tp, part.pieces) if part.pieces and part.is_repeated else tp
            self._check(part.pieces or part.rows, pieces, "heads" if part.pieces else "rows")
            self._check(tp, pieces, "heads")
        return sum(part.rows_of_rank(tp) for part in self.parts), self.cols

    def _of_experts(self, tp: int, expert_parallel: bool, dp: int) -> tuple[int, int]:
        if expert_parallel:
            return self.rows, self.cols // self.num_experts * -(-self.num_experts // (tp * dp))
        if part := next((part for part in self.parts if part.rows % (tp * dp)), None):
            engines = f" times --dp {dp}" if dp > 1 else ""
            raise UnsupportedError(
                f"--tp {tp}{engines}: {self.name} has {part.rows} rows per expert, which {tp * dp} ranks cannot share "
                "evenly. Give --enable-expert-parallel, or other numbers."
            )
        return self.rows // (tp * dp), self.cols

    def _check(self, count: int, tp: int, what: str) -> None:
        if count % tp:
            raise UnsupportedError(
                f"--tp {tp}: {self.name} has {count} {what}, which that many ranks cannot share evenly. "
                "Give another --tp, and --pp for the rest of the GPUs."
            )

    def is_on_stage(self, stage: int, layers: range, pp: int) -> bool:
        """Return whether pipeline stage `stage` of `pp`, which runs `layers`, holds the weight."""
        is_first, is_last = stage == 0, stage == pp - 1
        return {
            "layer": self.layer in layers,
            "first": is_first,
            "last": is_last,
            "tied": is_first or is_last,
            "all": True,
        }[self.place]
