"""Whole parameters that a model writes itself, past vLLM's weight loaders, while weights are loaded.

NemotronParse calls `param.data.copy_(tensor)` for its LM head and a layer of its image encoder. A layer that is to be
compressed waits on the meta device until all of it has arrived, and what is copied there is lost. So such a copy is
passed on to the parameter's weight loader, which vLLM counts and repeats.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_dfloat.integration.seam import layer_kinds, loader_calls


class DirectWrites(TorchDispatchMode):
    """A dispatch mode that passes copies into whole parameters on the meta device on to their weight loaders.

    It passes on none of a layer that several tensor-parallel ranks share: such a copy is a rank's own part, which a
    loader would cut again. Then the check for missing weights refuses the model. Those of experts take one at a time.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._by_storage: dict[int, Any] = {
            parameter.untyped_storage()._cdata: parameter
            for layer in model.modules()
            if getattr(layer, "tp_size", 1) == 1 and not layer_kinds.is_experts(layer)
            for parameter in layer.parameters(recurse=False)
            if parameter.is_meta and hasattr(parameter, "weight_loader")
        }

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        parameter = self._written(*args[:2]) if func is torch.ops.aten.copy_.default else None
        if parameter is None:
            return func(*args, **(kwargs or {}))
        parameter.weight_loader(parameter, args[1])
        return args[0]

    def _written(self, target: torch.Tensor, source: torch.Tensor) -> Any:
        """Return the parameter that a copy by the model itself would fill whole, or None."""
        if not target.is_meta or source.is_meta or loader_calls.is_counting():
            return None
        parameter = self._by_storage.get(target.untyped_storage()._cdata)
        if parameter is None or target.shape != parameter.shape or source.shape != parameter.shape:
            return None
        return parameter
