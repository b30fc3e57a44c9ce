"""vLLM's offload of weights to host memory, when they are compressed: what takes the place of its offloader."""

from typing import Any

import torch
import vllm.envs as envs
from vllm.model_executor.offloader import get_offloader, set_offloader
from vllm.model_executor.offloader.base import should_pin_memory
from vllm.model_executor.offloader.prefetch import PrefetchOffloader
from vllm.model_executor.offloader.uva import UVAOffloader
from vllm.utils.platform_utils import is_uva_available

from vllm_dfloat.device.host_arena import View
from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.integration.seam.prefetcher import PackedPrefetcher
from vllm_dfloat.integration.seam.uva_offloader import MOVED, PackedOffloader


def install() -> None:
    """Before a model is built: take the place of the offloader that vLLM has made from its options.

    Raises:
        UnsupportedError: on a GPU, UVA or pinned memory is switched off or not there.
    """
    before = get_offloader()
    if type(before) is UVAOffloader and before.cpu_offload_max_bytes:
        set_offloader(PackedOffloader(before, _view("--cpu-offload-gb")))
    elif type(before) is PrefetchOffloader and not before.module_offloaders:
        set_offloader(PackedPrefetcher(before, _view("--offload-group-size")))


def _view(option: str) -> View | None:
    """Return what makes a GPU's tensor of pinned host memory; None on a CPU.

    Raises:
        UnsupportedError: UVA or pinned memory is switched off or not there.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return None
    from vllm.utils.torch_utils import get_accelerator_view_from_cpu_tensor

    has_uva = is_uva_available() and not envs.VLLM_WEIGHT_OFFLOADING_DISABLE_UVA
    if not (has_uva and should_pin_memory()):
        raise UnsupportedError(
            f"{option}: compressed weights are read from pinned host memory through UVA, which is switched off or "
            "missing here; expected both. Unset VLLM_WEIGHT_OFFLOADING_DISABLE_UVA and "
            "VLLM_WEIGHT_OFFLOADING_DISABLE_PIN_MEMORY, or remove the option."
        )
    view: View = get_accelerator_view_from_cpu_tensor
    return view


def offloader() -> PackedOffloader | PackedPrefetcher | None:
    """Return the offloader of the model in this process, if vLLM's options ask for offload."""
    found = get_offloader()
    return found if isinstance(found, PackedOffloader | PackedPrefetcher) else None


def check_host_memory(vllm_config: Any) -> None:
    """Before a model's weights arrive: check that the host has room for the least that will be put there.

    Raises:
        DeviceError: it has not.
    """
    found = offloader()
    if found is not None:
        found.check_host_memory(vllm_config.parallel_config.local_world_size)


def finish_on_cpu() -> None:
    """When a model is loaded on a CPU: let a prefetching offloader make its buffers, as vLLM does on a GPU only."""
    found = offloader()
    if isinstance(found, PackedPrefetcher) and not (found.on_gpu or found.has_buffers):
        found.post_init()


def wait_for_copies() -> None:
    """Wait for payloads that are being copied to the device ahead of use."""
    found = offloader()
    if isinstance(found, PackedPrefetcher):
        found.wait_for_copies()


def buffer_bytes() -> int:
    """Return the bytes of the device into which payloads are copied from host memory ahead of use."""
    found = offloader()
    return found.buffer_bytes if isinstance(found, PackedPrefetcher) else 0


def is_moved(parameter: torch.Tensor) -> bool:
    """Return whether a BF16 parameter lies in host memory."""
    return bool(getattr(parameter, MOVED, False))
