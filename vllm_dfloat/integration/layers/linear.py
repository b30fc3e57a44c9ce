"""Compressed linear layers of every kind in vLLM: column, row, fused qkv and gate_up, replicated."""

from typing import Any

import torch
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import ModelWeightParameter
from vllm.model_executor.utils import set_weight_attrs

from vllm_dfloat.integration.layers.method import PackedMethod
from vllm_dfloat.integration.seam import compat

# vLLM's compile cache hashes this file's text, but not that of the op: increase this when the op's meaning changes.
OP_REVISION = 7


@register_weight_loader_v2_supported_method
class DFloat11LinearMethod(PackedMethod, LinearMethodBase):  # type: ignore[misc]  # vLLM is untyped
    """Loads like vLLM's unquantized method, but on the meta device; multiplies with the same GEMM."""

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        self.rows, self.cols = sum(output_partition_sizes), input_size_per_partition
        weight_loader = extra_weight_attrs.pop("weight_loader")
        data = torch.empty(self.rows, self.cols, dtype=params_dtype, device="meta")
        weight = ModelWeightParameter(
            data=data, input_dim=1, output_dim=0, weight_loader=weight_loader
        )
        layer.register_parameter("weight", weight)
        set_weight_attrs(weight, extra_weight_attrs)
        compat.process_when_complete(layer)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.multiply(layer, x, bias)
