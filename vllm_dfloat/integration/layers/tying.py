"""LM heads that are tied to the embedding, as the config says, and those that a checkpoint stores all the same.

A tied head is the embedding itself (`tied`). If the checkpoint stores a head, vLLM unties the two layers. If
their weights are equal, vLLM ties them again, but only if both are unquantized. Compressed layers stay two layers that
share one payload, so an update may make their weights differ.
"""

import dataclasses
import functools
import weakref
from typing import Any

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
)

from vllm_dfloat.device import ops
from vllm_dfloat.integration.layers import linear_op
from vllm_dfloat.integration.layers.method import packed_of
from vllm_dfloat.integration.seam import compat, layer_kinds
from vllm_dfloat.integration.seam.names import logger

_TIED = "dfloat11_is_lm_head"  # the attribute of an embedding that `tied` has returned


def prepare(model: torch.nn.Module, vllm_config: Any, model_config: Any) -> None:
    """Before loading: set `may_be_empty`, and set `twin` of embedding and LM head if vLLM has untied them."""
    layers: list[Any] = [layer for layer in model.modules() if layer_kinds.is_vocabulary(layer)]
    for layer in layers:
        if hasattr(layer.quant_method, "may_be_empty"):
            given = layer_kinds.may_be_the_targets(layer, vllm_config, model_config)
            layer.quant_method.may_be_empty = given
    tie_those_that_share(model)
    if not layer_kinds.is_untied_by_checkpoint(model_config):
        return
    heads = [layer for layer in layers if layer_kinds.is_lm_head(layer)]
    embeddings = [layer for layer in layers if not layer_kinds.is_lm_head(layer)]
    if len(heads) == len(embeddings) == 1:  # as vLLM: models with more, such as MTP, are not tied
        for layer, twin in ((heads[0], embeddings[0]), (embeddings[0], heads[0])):
            if hasattr(layer.quant_method, "twin"):
                layer.quant_method.twin = weakref.ref(twin)


def shared(packed: ops.PackedWeight, twin: torch.nn.Module | None) -> ops.PackedWeight:
    """Return the same weight, with the payload of `twin` if that has the same bytes. Payloads are never written to."""
    other = packed_of(twin) if twin is not None else None
    if other is None or not _is_same(packed, other):
        return packed
    return dataclasses.replace(other, name=packed.name).described_in(packed.desc)


def _is_same(left: ops.PackedWeight, right: ops.PackedWeight) -> bool:
    facts = [
        (type(w), w.rows, w.cols, w.fields, w.checksum, w.payload.shape) for w in (left, right)
    ]
    return facts[0] == facts[1] and torch.equal(left.payload, right.payload)


def warn_if_different(model: torch.nn.Module, model_config: Any) -> None:
    """After loading: warn, as vLLM does, if the LM head differs from the embedding to which config.json ties it."""
    for name, layer in model.named_modules():
        twin = getattr(getattr(layer, "quant_method", None), "twin", None)
        if twin is None or not layer_kinds.is_lm_head(layer):
            continue
        head, embedding = packed_of(layer), packed_of(twin())
        if head and embedding and head.payload is not embedding.payload:
            logger.warning(
                "dfloat11: config.json of %s says that the LM head is the embedding, but the checkpoint has another "
                "%s, which is used. Set tie_word_embeddings to false to silence this.",
                model_config.model,
                name,
            )


def tied(head: Any, embed_tokens: torch.nn.Module) -> torch.nn.Module:
    """Return the module to use as LM head: the embedding, since to share `weight` would share only the placeholder.

    An embedding of torch's own, as Whisper's, cannot multiply. The head then reads its BF16 weight.
    """
    if layer_kinds.is_vocabulary(embed_tokens):
        return _as_lm_head(embed_tokens)
    compat.process_at_the_end(head)
    del head.weight
    head.__dict__["weight"] = (
        embed_tokens.weight
    )  # no parameter: an update of the embedding is all that it needs
    head.quant_method = SharedWeightMethod()
    return head  # type: ignore[no-any-return]


class SharedWeightMethod(UnquantizedEmbeddingMethod):  # type: ignore[misc]  # vLLM is untyped
    """Multiplies by the BF16 weight of an embedding that is not vLLM's, as it is now."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Do nothing: on a CPU vLLM would keep a packed copy, which no update of the embedding reaches."""

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if x.device.type == "cpu":
            return linear_op.cpu_gemm(x, layer.weight, bias)
        return super().apply(layer, x, bias)  # type: ignore[no-any-return]


def tie_those_that_share(model: torch.nn.Module) -> None:
    """Put the embedding in the place of a compressed LM head that a model, as ChatGLM, has given its parameter."""
    layers: list[Any] = [layer for layer in model.modules() if layer_kinds.is_vocabulary(layer)]
    embeddings = {
        id(layer.weight): layer
        for layer in layers
        if not layer_kinds.is_lm_head(layer) and not layer_kinds.is_left_out(layer)
    }
    for head in filter(layer_kinds.is_lm_head, layers):
        embedding = embeddings.get(id(head.weight))
        if embedding is None or isinstance(head.quant_method, UnquantizedEmbeddingMethod):
            continue
        for parent in list(model.modules()):
            for name, child in list(parent._modules.items()):
                if child is head:
                    setattr(parent, name, tied(head, embedding))


def is_tied(layer: torch.nn.Module) -> bool:
    """Return whether an embedding has become the LM head of a model by `tied`."""
    return _TIED in layer.__dict__


def _as_lm_head(embed_tokens: torch.nn.Module) -> torch.nn.Module:
    """Give an embedding what models ask of an LM head, and return it.

    vLLM's Transformers backend reads `bias`, and creates it when a checkpoint, as CTRL's, has one.
    """
    embed_tokens.__dict__[_TIED] = True
    if not hasattr(embed_tokens, "bias"):
        embed_tokens.register_parameter("bias", None)
        embed_tokens.__dict__["_register_bias"] = functools.partial(
            ParallelLMHead._register_bias, embed_tokens
        )
    return embed_tokens
