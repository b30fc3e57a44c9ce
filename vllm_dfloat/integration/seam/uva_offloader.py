"""vLLM's options for CPU offload (--cpu-offload-gb, --cpu-offload-params), with weights that are compressed.

vLLM's UVA offloader moves parameters to the host while the model is built. A compressed layer has no values then, and
its size is not known. So the offloader here only notes which of them vLLM's rule names; when such a layer's payload is
made, it goes to host memory as long as the budget has room. The first that does not fit ends this, as in vLLM. An
update leaves every payload where it is, host or device.

Matrices that stay BF16 (ignored layers, routers) go as vLLM would take them, while the model is built, and
count too. Norms and biases stay on the device: read in every pass, and of no size.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from vllm.model_executor.offloader.uva import UVAOffloader

from vllm_dfloat.device.host_arena import HostArena, View
from vllm_dfloat.device.packed_weight import PackedWeight
from vllm_dfloat.integration.seam import layer_kinds
from vllm_dfloat.integration.seam.names import logger
from vllm_dfloat.integration.seam.places import LEAST_SHARE, PLACE, Give, Place

MOVED = "_vllm_is_uva_offloaded"  # vLLM's mark of a parameter in host memory
GIB = 1 << 30
GROWTH_SHARE = 64  # one part of so many of the budget is left for weights that grow in an update


class PackedOffloader(UVAOffloader):  # type: ignore[misc]  # vLLM is untyped
    """Takes the place of vLLM's UVA offloader, with the same options.

    `cpu_offload_bytes`, vLLM's count of what lies on the host, counts compressed bytes.

    Attributes:
        num_named: parameters that vLLM's rule names.
    """

    def __init__(self, before: UVAOffloader, view: View | None) -> None:
        super().__init__(before.cpu_offload_max_bytes, before.cpu_offload_params)
        self.cpu_offload_bytes = before.cpu_offload_bytes
        self.arena = HostArena(view)
        self._view = view
        self._is_spent = False
        self._named_bytes = 0  # of the named compressed parameters, in BF16
        self.num_named = 0

    def wrap_modules(
        self, modules_generator: Iterable[torch.nn.Module], prefix: str = ""
    ) -> list[torch.nn.Module]:
        """Note what vLLM's rule names in the modules, and return them."""
        before = f"{prefix}." if prefix else ""
        modules = []
        for module in modules_generator:
            modules.append(module)
            for name, parameter in list(module.named_parameters()):
                if self._names(before + name):
                    self._note(module, name, parameter)
        return modules

    def _names(self, name: str) -> bool:
        wanted = self.cpu_offload_params
        return not wanted or any(f".{segment}." in f".{name}." for segment in wanted)

    def _note(self, module: torch.nn.Module, path: str, parameter: torch.Tensor) -> None:
        owner, _, name = path.rpartition(".")
        layer = module.get_submodule(owner)
        # An embedding may get its method later; until then it is a BF16 matrix.
        if parameter.is_meta or layer_kinds.is_vocabulary(layer):
            place = layer.__dict__.setdefault(PLACE, Place(self))
            if name not in place.names:
                place.names.add(name)
                self.num_named += 1
                self._named_bytes += 2 * parameter.numel()
        elif parameter.dim() > 1 and self._view is not None:
            self.num_named += 1
            self._move(parameter, path, self._view)

    def _move(self, parameter: torch.Tensor, name: str, view: View) -> None:
        """Move a BF16 matrix to host memory, as vLLM does, if the budget has room."""
        size = parameter.nbytes
        is_there = getattr(parameter, MOVED, False)
        if is_there or self.cpu_offload_bytes + size > self.cpu_offload_max_bytes:
            return
        self.arena.check_room(size, name)
        parameter.data = view(parameter.data.to("cpu").pin_memory())
        setattr(parameter, MOVED, True)
        self.cpu_offload_bytes += size

    def check_host_memory(self, num_ranks: int) -> None:
        """Before anything arrives: check that the host has room for the least that will be put there.

        Args:
            num_ranks: ranks of this host, which need as much each.

        Raises:
            DeviceError: it has not.
        """
        room = self.cpu_offload_max_bytes - self.cpu_offload_bytes
        least = min(room, int(LEAST_SHARE * self._named_bytes))
        self._named_bytes = 0  # a draft model comes next
        ranks = f", for {num_ranks} ranks" if num_ranks > 1 else ""
        if least > 0:
            self.arena.check_room(num_ranks * least, f"{self.given}{ranks}")

    def take(self, place: Place, name: str, packed: PackedWeight) -> PackedWeight:
        """Return a new payload's weight as it is to be held: in host memory, or unchanged."""
        size, before = packed.payload.nbytes, place.held.get(name)
        used = self.cpu_offload_bytes - (before or 0)
        if self.arena.holds(packed.payload):  # an update was undone
            place.held[name], self.cpu_offload_bytes = size, used + size
            return packed
        is_chosen = self._chooses(size) if name not in place.held else before is not None
        if not is_chosen or used + size > self.cpu_offload_max_bytes:
            if before:
                self._tell_that_it_grew(packed)
            place.held[name] = 0 if is_chosen else None
            self.cpu_offload_bytes = used
            return packed
        moved = replace(packed, payload=self.arena.put(packed.payload, packed.name))
        place.held[name], self.cpu_offload_bytes = size, used + size
        return moved.described_in(packed.desc)

    def settle(self, place: Place, name: str, packed: PackedWeight, give: Give) -> None:
        """Do nothing: a payload is read where `take` has put it."""

    def _chooses(self, size: int) -> bool:
        """Return whether the first payload of a parameter goes to host memory."""
        limit = self.cpu_offload_max_bytes - self.cpu_offload_max_bytes // GROWTH_SHARE
        self._is_spent |= self.cpu_offload_bytes + size > limit
        return size > 0 and not self._is_spent

    def _tell_that_it_grew(self, packed: PackedWeight) -> None:
        logger.warning(
            "dfloat11: %s grew to %d bytes, for which %s has no room; it is on the device now",
            packed.name,
            packed.payload.nbytes,
            self.given,
        )

    # What it was asked for.

    @property
    def given(self) -> str:
        """vLLM's option, as it is typed."""
        return f"--cpu-offload-gb {self.cpu_offload_max_bytes / GIB:.4g}"

    @property
    def segments(self) -> str:
        """The option that chooses parameters, as it is typed; empty if all are chosen."""
        names = " ".join(sorted(self.cpu_offload_params))
        return f"--cpu-offload-params {names}" if names else ""
