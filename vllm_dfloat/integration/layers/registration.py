"""Register the plugin's ops with torch, in the namespace `vllm_dfloat`. They are opaque to a traced graph."""

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
        schema: name and arguments of the op, in torch's notation.
        function: its implementation.
        fake: its implementation for tensors without storage; tracing gets shapes and dtypes from it.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, function, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(torch.ops.vllm_dfloat, name).default  # type: ignore[no-any-return]
