"""Make the weights of vLLM's modules: fused linear layers, and tensors that are not compressed."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vllm_dfloat.plan.weights import Part, Place, Split, Weight


@dataclass(frozen=True)
class Spot:
    """Where in the model a weight is: `Weight.layer` and `Weight.place`."""

    layer: int = -1
    place: Place = "layer"


EVERYWHERE = Spot(place="all")  # every pipeline stage has a copy of the tower


def linear(
    at: Spot,
    name: str,
    parts: Part | tuple[Part, ...],
    cols: int,
    split: Split,
    *,
    tensors: Mapping[str, int] | None = None,
    bias: bool = False,
    is_compressed: bool = True,
) -> Iterator[Weight]:
    """Yield a linear layer [rows of all parts, cols] and its bias.

    Args:
        name: the module, such as "model.layers.3.mlp.gate_up_proj".
        tensors: the modules in the checkpoint that it is fused from, with their rows.
        split: how tensor parallelism cuts it; each rank holds the biases of its rows.
    """
    parts = (parts,) if isinstance(parts, Part) else parts
    parent, _, own = name.rpartition(".")
    tensors = tensors or {own: sum(part.rows for part in parts)}
    stored: dict[str, tuple[int, ...]]
    stored = {f"{parent}.{module}.weight": (rows, cols) for module, rows in tensors.items()}
    yield Weight(name, parts, cols, split, at.place, at.layer, is_compressed, stored)
    if bias:
        stored = {f"{parent}.{module}.bias": (rows,) for module, rows in tensors.items()}
        cut: Split = "rows" if split == "rows" else "none"
        yield Weight(f"{name}.bias", parts, 1, cut, at.place, at.layer, stored=stored)


def plain(at: Spot, name: str, *shape: int, itemsize: int = 2) -> Weight:
    """Return a tensor that every rank holds whole and uncompressed: a norm, a convolution, a position embedding.

    Args:
        name: the tensor's own, "model.norm.weight".
    """
    return Weight(
        name.removesuffix(".weight"), (Part(shape[0]),), math.prod(shape[1:]),
        place=at.place, layer=at.layer, stored={name: shape}, itemsize=itemsize,
    )  # fmt: skip


def norm(at: Spot, name: str, length: int, bias: bool = False) -> Iterator[Weight]:
    """Yield the weight of a norm, and its bias if it has one."""
    yield plain(at, f"{name}.weight", length)
    if bias:
        yield plain(at, f"{name}.bias", length)


def mlp(
    at: Spot, name: str, hidden: int, width: int, *, is_fused: bool = False, bias: bool = False
) -> Iterator[Weight]:
    """Yield a gated MLP; `is_fused`: gate and up are one tensor in the checkpoint too."""
    tensors = {"gate_up_proj": 2 * width} if is_fused else {"gate_proj": width, "up_proj": width}
    parts = Part(width), Part(width)
    yield from linear(at, f"{name}.gate_up_proj", parts, hidden, "rows", tensors=tensors, bias=bias)
    yield from linear(at, f"{name}.down_proj", Part(hidden), width, "cols", bias=bias)


def two_layers(
    at: Spot, names: tuple[str, str], sizes: tuple[int, int, int], *, bias: bool = True, is_compressed: bool = True
) -> Iterator[Weight]:  # fmt: skip
    """Yield two linear layers in a row: from sizes[0] to sizes[1] to sizes[2] features."""
    first, middle, last = sizes
    for name, rows, cols, split in (
        (names[0], middle, first, "rows"),
        (names[1], last, middle, "cols"),
    ):
        cut: Split = "rows" if split == "rows" else "cols"
        yield from linear(at, name, Part(rows), cols, cut, bias=bias, is_compressed=is_compressed)
