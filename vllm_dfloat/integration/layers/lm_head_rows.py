"""LM heads that exist only while a model is loaded: vLLM makes a reranker's classifier of a few of their rows.

For a model with tied embeddings vLLM gives such a head the embedding's parameter, and reads its rows after the last
tensor of the checkpoint. The parameter of a compressed embedding never has values, so the head gets a decoded copy.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.nn import Parameter

from vllm_dfloat.integration.layers.embedding import DFloat11EmbeddingMethod
from vllm_dfloat.integration.layers.method import packed_of
from vllm_dfloat.integration.seam import layer_kinds, layerwise

Pairs = Iterable[tuple[str, torch.Tensor]]


def readable_after(pairs: Pairs, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the pairs of a checkpoint; after the last one, give heads that share a compressed embedding's parameter
    the embedding's values.

    Raises:
        UnsupportedError: the embedding is incomplete.
    """
    sharing = list(_sharing(model))
    yield from pairs
    for head, embedding in sharing:
        _complete(embedding)
        values = embedding.quant_method.dequantize_weight(embedding)
        head.weight = Parameter(values, requires_grad=False)


def _sharing(model: torch.nn.Module) -> Iterator[tuple[Any, Any]]:
    """Yield (head, embedding) for each LM head that has the parameter of a compressed embedding, and not its method."""
    layers: list[Any] = [layer for layer in model.modules() if layer_kinds.is_vocabulary(layer)]
    for embedding in layers:
        if isinstance(embedding.quant_method, DFloat11EmbeddingMethod):
            for head in filter(layer_kinds.is_lm_head, layers):
                if head is not embedding and head.weight is embedding.weight:
                    yield head, embedding


def _complete(embedding: torch.nn.Module) -> None:
    """Compress an embedding that waits for its padding, which never arrives; refuse one without weights."""
    is_new = packed_of(embedding) is None
    if is_new or (layerwise.is_open(embedding) and not layerwise.has_nothing(embedding)):
        layerwise.process(embedding)
