"""How the plugin's ops get into torch: the namespace `vllm_dfloat`, of which a traced graph sees no inside."""

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "vllm_dfloat"
_library: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]


def register(
    schema: str, function: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Register an op for CPU and CUDA tensors and return it.

    Args:
        schema: its name and arguments, in torch's notation.
        function: what it does.
        fake: the same for tensors without storage, from which a trace learns shapes and dtypes.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, function, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(torch.ops.vllm_dfloat, name).default  # type: ignore[no-any-return]
