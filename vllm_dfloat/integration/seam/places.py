"""Where payloads lie, on the device or on the host: what an offloader has noted of a layer while the model was built.

Layers ask here when a payload is made, and know neither vLLM's options nor its offloaders.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from vllm_dfloat.device.packed_weight import PackedWeight

PLACE = "dfloat11_place"  # the attribute of a layer that vLLM's rule names: its Place

# Of a BF16 matrix, the least that its payload takes: of trained weights it takes 0.66 to 0.68.
LEAST_SHARE = 0.6

Give = Callable[[PackedWeight], None]


class Keeper(Protocol):
    """What decides on the payloads of a layer."""

    def take(self, place: "Place", name: str, packed: PackedWeight) -> PackedWeight:
        """Return a new payload's weight as it is to be held: in host memory, or unchanged."""

    def settle(self, place: "Place", name: str, packed: PackedWeight, give: Give) -> None:
        """Note the weight that a layer holds from now on; `give` replaces it by the same one held elsewhere."""


@dataclass
class Place:
    """Where the payloads of a layer lie.

    Attributes:
        path: of the layer, in the module that vLLM offloads as a whole.
        names: the parameters that vLLM's rule names.
        held: for each that has a payload, its bytes in host memory; 0 if it has outgrown its room there, and comes back
            when it fits; None if it was not chosen.
    """

    keeper: Keeper
    path: str = ""
    names: set[str] = field(default_factory=set)
    held: dict[str, int | None] = field(default_factory=dict)


def _place_of(layer: torch.nn.Module, name: str) -> Place | None:
    place = layer.__dict__.get(PLACE)
    return place if place is not None and name in place.names else None


def placed(layer: torch.nn.Module, packed: PackedWeight, name: str = "weight") -> PackedWeight:
    """Return a layer's new compressed weight as it is to be held: its payload may go to host memory.

    Args:
        name: the parameter whose weight it is.

    Raises:
        DeviceError: the host's memory is too small.
    """
    place = _place_of(layer, name)
    return packed if place is None else place.keeper.take(place, name, packed)


def settle(layer: torch.nn.Module, packed: PackedWeight, name: str, give: Give) -> None:
    """Tell what has placed a parameter's payload that the layer holds it now.

    Args:
        give: puts the same weight, held elsewhere, in its place.
    """
    place = _place_of(layer, name)
    if place is not None:
        place.keeper.settle(place, name, packed, give)


def is_on_host(layer: torch.nn.Module, name: str = "weight") -> bool:
    """Return whether vLLM's options for offload hold the payload of a layer's parameter in host memory."""
    place = layer.__dict__.get(PLACE)
    return place is not None and bool(place.held.get(name))
