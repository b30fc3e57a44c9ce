"""Look for copies of weights in all tensors that are alive in this process."""

import ctypes
import gc
from contextlib import suppress

import torch
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from vllm_dfloat.device.scratch import scratch

WITHOUT_MEMORY = (FakeTensor, FunctionalTensor)  # remain from tracing in earlier tests


def bf16_copies(prints: dict[str, bytes]) -> list[str]:
    """Return the names whose bytes lie in any live BF16 tensor of this process, at any offset."""
    gc.unfreeze()  # vLLM hides the objects of a started engine from the collector, and so from this scan
    storages = {}
    for thing in gc.get_objects():
        if not issubclass(type(thing), torch.Tensor) or issubclass(type(thing), WITHOUT_MEMORY):
            continue
        with torch._C.DisableTorchFunctionSubclass():  # placeholders tell nobody of their storage
            if thing.dtype == torch.bfloat16 and thing.device.type == "cpu" and thing.numel():
                with suppress(RuntimeError):  # as WITHOUT_MEMORY, but of the class Tensor
                    storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage()
    # The scratch holds the layer that was decoded last, as intended.
    storages.pop(scratch.take(torch.device("cpu"), 0)[0].data_ptr(), None)
    contents = [ctypes.string_at(s.data_ptr(), s.nbytes()) for s in storages.values()]
    return [name for name, print_ in prints.items() for content in contents if print_ in content]
