"""Compressed vocabulary embeddings and LM heads; a tied pair is one matrix, held once."""

from typing import Any

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.utils import set_weight_attrs

from vllm_dfloat.integration import compat, lookup
from vllm_dfloat.integration.packed import PackedMethod

# vLLM's cache of compiled models knows this file's text and not the ops': count up when they mean something else.
OP_REVISION = 4


class DFloat11EmbeddingMethod(PackedMethod, QuantizeMethodBase):  # type: ignore[misc]  # vLLM is untyped
    """Looks rows up by decoding only them; as an LM head multiplies by the whole matrix."""

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
        data = torch.empty(self.rows, self.cols, dtype=params_dtype, device="meta")
        weight = Parameter(data, requires_grad=False)
        set_weight_attrs(weight, {"input_dim": 1, "output_dim": 0, **extra_weight_attrs})
        layer.register_parameter("weight", weight)
        compat.process_when_complete(layer)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.multiply(layer, x, bias)

    def embedding(self, layer: Any, input_: torch.Tensor) -> torch.Tensor:
        self.check_in_place(layer)
        ids = input_.reshape(-1)
        rows = lookup.look_up(layer.dfloat11_desc, ids, self.rows, self.cols, self.layout)
        return rows.view(*input_.shape, self.cols)

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        """Return the embedding, which serves as the LM head too: sharing `weight` would share an empty one."""
        return embed_tokens

    def _backend(self, config: object) -> str:
        return "auto"  # as in vLLM, where --linear-backend does not reach LM heads

    def _expected_numel(self, layer: Any, weight: torch.Tensor) -> int:
        # The loader does not count the rows that pad the vocabulary, and a rank may have no others.
        rows: int = layer.shard_indices.num_org_elements
        return rows * self.cols


class IgnoredLMHeadMethod(UnquantizedEmbeddingMethod):  # type: ignore[misc]  # vLLM is untyped
    """An LM head left in BF16. If it is tied, the embedding decides how their one matrix is held."""

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        return embed_tokens
