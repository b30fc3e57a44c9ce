"""vLLM's prefetching offload (--offload-group-size and its like), with weights that are compressed.

Which blocks it takes, when it copies, its streams, events and rules for CUDA graphs are vLLM's code; staging.py has
what is copied. While a model is loaded, a payload goes to pinned host memory as soon as it is made, and is read from
there, as with --cpu-offload-gb. When all are known vLLM allocates the buffers.

On a CPU, where BF16 vLLM stops with an error, memory is plain and a copy is made at once.
"""

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.model_executor.offloader import prefetch

from vllm_dfloat.codec.descriptor import DESC_LENGTH
from vllm_dfloat.device.host_arena import HostArena, View
from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.integration.seam import compat
from vllm_dfloat.integration.seam.places import LEAST_SHARE
from vllm_dfloat.integration.seam.staging import StagedModule


class PackedPrefetcher(prefetch.PrefetchOffloader):  # type: ignore[misc]  # vLLM is untyped
    """Takes the place of vLLM's prefetching offloader, with the same options.

    Attributes:
        arena: the host memory of its payloads.
        device: where the model runs.
        on_gpu: whether vLLM's streams make the copies.
        rows_taken: of the descriptors of each slot, those that a block has.
        has_buffers: whether payloads are read in buffers by now.
    """

    def __init__(self, before: prefetch.PrefetchOffloader, view: View | None) -> None:
        self.__dict__.update(before.__dict__)  # its options and its stream
        self.arena = HostArena(view)
        self.device = compat.model_device()
        self.on_gpu = view is not None
        self.rows_taken: dict[int, int] = {}
        self.has_buffers = False
        self._is_built = False
        self._in_slot: dict[int, StagedModule] = {}

    def wrap_modules(
        self, modules_generator: Iterable[torch.nn.Module], prefix: str = ""
    ) -> list[torch.nn.Module]:
        """Let vLLM choose blocks and hook their forward; those of a draft model stay on the device.

        Raises:
            UnsupportedError: the model has several stacks of blocks, or vLLM would copy into a slot in use.
        """
        if self._is_built:
            return list(modules_generator)
        if self.module_offloaders:
            raise UnsupportedError(
                f"{self.given}: this model has several stacks of transformer blocks, and vLLM's prefetching offload "
                "takes one; expected one. Use --cpu-offload-gb."
            )
        given = {"prefix": prefix} if prefix else {}  # 0.28 has none
        with self._making_staged_modules():
            modules: list[torch.nn.Module] = super().wrap_modules(modules_generator, **given)
        self._check_ring()
        self._make_tables()
        return modules

    @contextmanager
    def _making_staged_modules(self) -> Iterator[None]:
        before = prefetch._ModuleOffloader
        prefetch._ModuleOffloader = functools.partial(_make, self)
        try:
            yield
        finally:
            prefetch._ModuleOffloader = before

    def _check_ring(self) -> None:
        step, count = self.prefetch_step, len(self.module_offloaders)
        keeps_slots = hasattr(prefetch, "_get_next_prefetch_index")  # vLLM 0.28 does not
        if step < count and count % step and not keeps_slots:
            raise UnsupportedError(
                f"--offload-prefetch-step {step}: this version of vLLM copies a layer into a buffer that is still in "
                f"use unless the number of offloaded layers, {count}, is a multiple of it; expected one. Use "
                "--offload-prefetch-step 1, or a newer vLLM."
            )

    def _make_tables(self) -> None:
        rows: dict[int, int] = {}
        for module in self.module_offloaders:
            rows[module.slot] = rows.get(module.slot, 0) + len(module.stages)
        shapes = {slot: (count, DESC_LENGTH) for slot, count in rows.items()}
        tables = {
            slot: torch.zeros(shape, dtype=torch.int64, device=self.device)
            for slot, shape in shapes.items()
        }
        nowhere = {slot: self.on_host(count) for slot, count in rows.items()}
        self.rows_taken = dict.fromkeys(rows, 0)
        for module in self.module_offloaders:
            module.take_rows(tables[module.slot], nowhere[module.slot])

    def on_host(self, num_rows: int) -> torch.Tensor:
        """Return descriptors on the host, NOWHERE in every row: int64 [num_rows, DESC_LENGTH], pinned on a GPU."""
        shape = num_rows, DESC_LENGTH
        return torch.zeros(shape, dtype=torch.int64, device="cpu", pin_memory=self.on_gpu)

    def check_host_memory(self, num_ranks: int) -> None:
        """Before anything arrives: check that the host has room for the least that will be put there.

        Args:
            num_ranks: ranks of this host, which need as much each.

        Raises:
            DeviceError: it has not.
        """
        least = int(LEAST_SHARE * sum(module.bf16_bytes for module in self.module_offloaders))
        ranks = f", for {num_ranks} ranks" if num_ranks > 1 else ""
        if least > 0 and not self._is_built:
            self.arena.check_room(num_ranks * least, f"{self.given}{ranks}")
        self._is_built = True

    def post_init(self) -> None:
        """Allocate buffers, let descriptors tell of them, and start the first copies. On a CPU the loader calls it."""
        super().post_init()
        self.has_buffers = self.buffer_pool is not None

    def largest(self, path: str) -> int:
        """Return the bytes of each buffer for a parameter: of the largest payload of that name."""
        rooms = [
            module.stages[path].room for module in self.module_offloaders if path in module.stages
        ]
        return max(rooms, default=0)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the device that all buffers take, as soon as the payloads are known."""
        paths = {path for module in self.module_offloaders for path in module.stages}
        slots: int = self.prefetch_step
        return slots * sum(map(self.largest, paths))

    # The ring.

    def is_in_its_slot(self, module: StagedModule) -> bool:
        """Return whether the slot's last copy was that of this block."""
        return self._in_slot.get(module.slot) is module

    def note_turn(self, module: StagedModule) -> None:
        """Note that a block's payloads are being copied to its slot."""
        self._in_slot[module.slot] = module

    def wait_for_copies(self) -> None:
        """Wait for every copy that reads host memory, so that it may be written to."""
        if self.has_buffers and self.on_gpu:
            torch.cuda.synchronize()

    def _wait_for_layer(self, layer_idx: int) -> None:
        module = self.module_offloaders[layer_idx]
        if not self.is_in_its_slot(
            module
        ):  # layers that run out of order, or a pass that ended early
            module.start_onload_to_static()
        if self.on_gpu:
            super()._wait_for_layer(layer_idx)

    def sync_prev_onload(self) -> None:
        """Let the current stream wait for the copies."""
        if self.on_gpu:
            super().sync_prev_onload()

    # What it was asked for.

    @property
    def given(self) -> str:
        """vLLM's options, as they are typed."""
        return (
            f"--offload-group-size {self.group_size} --offload-num-in-group {self.num_in_group} "
            f"--offload-prefetch-step {self.prefetch_step}"
        )

    @property
    def segments(self) -> str:
        """The option that chooses parameters, as it is typed; empty if all are chosen."""
        names = " ".join(sorted(self.offload_params))
        return f"--offload-params {names}" if names else ""

    @property
    def num_named(self) -> int:
        """Compressed parameters that vLLM's rule names."""
        return sum(len(module.stages) for module in self.module_offloaders)


def _make(
    offloader: PackedPrefetcher, *, whitelist_param_names: list[str], **given: Any
) -> StagedModule:
    return StagedModule(offloader, whitelist_param_names, **given)
