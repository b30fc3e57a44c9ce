"""Compressed vocabulary embeddings and LM heads; a tied pair is one matrix, held once."""

import weakref
from typing import Any

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.utils import set_weight_attrs

from vllm_dfloat.device import ops
from vllm_dfloat.integration.layers import head_op, lookup, tying
from vllm_dfloat.integration.layers.method import PackedMethod
from vllm_dfloat.integration.seam import compat, layer_kinds, layerwise, slots
from vllm_dfloat.integration.seam.names import logger
from vllm_dfloat.integration.seam.options import Options

# vLLM's compile cache hashes this file's text, but not that of the ops: increase this when an op's meaning changes.
OP_REVISION = 7


class DFloat11EmbeddingMethod(PackedMethod, QuantizeMethodBase):  # type: ignore[misc]  # vLLM is untyped
    """Decodes only the rows that are looked up; as an LM head it multiplies by the whole matrix, or slab by slab.

    Attributes:
        slab: rows of a slab of an LM head; 0 if the scratch holds the whole matrix (heads.py).
        slab_option: the option `slab`.
        slots_of_heads: of the scratch, where LM heads run.
        twin: for an LM head the embedding, for an embedding the LM head, if the checkpoint stores both (tying.py).
        may_be_empty: whether vLLM replaces this layer if the checkpoint of a draft model has no weight for it.
    """

    twin: "weakref.ref[torch.nn.Module] | None" = None
    may_be_empty = False
    slab = 0

    def __init__(self, name: str, options: Options) -> None:
        super().__init__(name, options)
        self.slab_option = options.slab
        self.slots_of_heads = slots.main_slots(compat.current_config())

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
        if not self.slab:
            return self.multiply(layer, x, bias)
        layer = getattr(layer, "base_layer", layer)  # as in `multiply`
        self.check_in_place(layer)
        sizes = [self.rows, self.cols, self.fused_rows, self.in_order_rows, self.slab]
        return head_op.op(x, layer.dfloat11_desc, bias, sizes, self.gemm, self.layout)

    def _require_scratch(self, device: torch.device) -> None:
        """Require none: rows are looked up without, and what an LM head needs is decided later (heads.py)."""

    def _finish(self, layer: torch.nn.Module) -> None:
        self.settle_fused_rows(layer.get_parameter("weight").device)

    def embedding(self, layer: Any, input_: torch.Tensor) -> torch.Tensor:
        self.check_in_place(layer)
        ids = input_.reshape(-1)
        rows = lookup.look_up(layer.dfloat11_desc, ids, self.rows, self.cols, self.layout)
        return rows.view(*input_.shape, self.cols)

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        return tying.tied(layer, embed_tokens)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if (
            self.may_be_empty
            and layer.weight is not self.placeholder
            and layerwise.has_nothing(layer)
        ):
            device = layer.get_parameter("weight").device
            del layer.weight
            self._put_placeholder(layer, device)
            return
        super().process_weights_after_loading(layer)

    def _replace_weight(self, layer: torch.nn.Module, packed: ops.PackedWeight) -> None:
        super()._replace_weight(layer, tying.shared(packed, self.twin() if self.twin else None))

    def _backend(self, config: object) -> str:
        return "auto"  # as in vLLM, where --linear-backend does not apply to LM heads


class IgnoredLMHeadMethod(UnquantizedEmbeddingMethod):  # type: ignore[misc]  # vLLM is untyped
    """An LM head left in BF16. If it is tied, the embedding's method decides how their one matrix is held."""

    twin: "weakref.ref[torch.nn.Module] | None" = None  # the embedding, if both are stored

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        if self.twin is not None:
            # vLLM would share the parameter of an equal copy. An update of one would then change both.
            return layer
        if layer_kinds.is_vocabulary(embed_tokens):
            logger.info("dfloat11: ignore: the LM head is the embedding, and is held as that is")
        return tying.tied(layer, embed_tokens)
