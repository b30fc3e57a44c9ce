"""Embeddings and LM heads that vLLM's models build without asking the quantization config.

About a third of vLLM's models pass no `quant_config` to them (Gemma 1 and 2, Cohere, Falcon, OPT, Mixtral, BERT and
others). They get their method here, after the model is built and before its weights arrive.
"""

from collections import defaultdict
from typing import Any

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from vllm_dfloat.integration.layers import tying
from vllm_dfloat.integration.layers.embedding import DFloat11EmbeddingMethod
from vllm_dfloat.integration.seam import compat, layer_kinds, weight_readers
from vllm_dfloat.integration.seam.names import ASKED


def compress(model: torch.nn.Module, vllm_config: Any, model_config: Any) -> None:
    """Ask the config about each embedding and LM head that was not asked about, and give it the method it names.

    Those stay BF16 whose values the model's code reads, whose parameter layers of other kinds share, and LM heads with
    a bias of their own that share the embedding's parameter.
    """
    sharing = _sharing(model)
    names = {layer: path for path, layer in model.named_modules()}
    unasked = [layer for layer in names if _is_unasked(layer)]
    if not unasked:
        return
    read = weight_readers.names_read(model)
    with compat.as_current(vllm_config):
        config = compat.quant_config_of(vllm_config, model_config)
    for layer in unasked:
        layers = sharing[_memory(layer.weight)]
        if layer_kinds.is_lm_head(layer) and len(layers) > 1:
            continue  # decided with the embedding, whose weight it has
        name = names[layer]
        if not _can_be_compressed(layer, layers):
            config.log_left_alone(f"{name} (layers of other kinds share its weight)")
            continue
        if any(
            weight_readers.is_read(one, path, read) for one in layers for path in _paths(one, model)
        ):
            config.log_left_alone(f"{name} (the model's code reads its BF16 weight)")
            continue
        with compat.as_current(vllm_config):
            method = config.get_quant_method(layer, name)
        if isinstance(method, DFloat11EmbeddingMethod):
            _give(method, layer)
            for head in layers:
                if head is not layer:  # the embedding takes its place below
                    head.quant_method, head.weight = method, layer.weight
        elif method is not None:
            layer.quant_method = method
    tying.tie_those_that_share(model)


def _is_unasked(layer: Any) -> bool:
    return (
        layer_kinds.is_vocabulary(layer)
        and type(layer.quant_method) is UnquantizedEmbeddingMethod
        and ASKED not in layer.__dict__
        and not layer.weight.is_meta
    )


def _sharing(model: torch.nn.Module) -> dict[int, list[Any]]:
    """Return, by memory, the layers that have a parameter in it; a layer as often as it has parameters there."""
    found: dict[int, list[Any]] = defaultdict(list)
    for layer in model.modules():
        for parameter in layer._parameters.values():
            if parameter is not None and not parameter.is_meta:
                found[_memory(parameter)].append(layer)
    return found


def _memory(parameter: torch.Tensor) -> int:
    return int(parameter.untyped_storage()._cdata)


def _can_be_compressed(layer: Any, sharing: list[Any]) -> bool:
    """Return whether the layer has a plain weight that is its own, or that it shares with LM heads without a bias."""
    others = [other for other in sharing if other is not layer]
    return (
        type(layer.weight) is torch.nn.Parameter
        and set(layer._parameters) <= {"weight", "bias"}
        and sharing.count(layer) == 1
        and all(
            layer_kinds.is_lm_head(other)
            and other.weight is layer.weight
            and getattr(other, "bias", None) is None
            and type(other.quant_method) is UnquantizedEmbeddingMethod
            for other in others
        )
    )


def _paths(layer: torch.nn.Module, model: torch.nn.Module) -> list[str]:
    """Return every path of a layer; one that is both embedding and LM head has two."""
    return [path for path, one in model.named_modules(remove_duplicate=False) if one is layer]


def _give(method: DFloat11EmbeddingMethod, layer: Any) -> None:
    """Replace the layer's parameter as if vLLM had built the layer with this method."""
    old = layer.weight
    attributes = {"weight_loader": layer.weight_loader, **old.__dict__}
    for name in ("input_dim", "output_dim"):  # set by the method
        attributes.pop(name, None)
    del layer.weight
    layer.quant_method = method
    method.create_weights(
        layer,
        old.shape[1],
        [old.shape[0]],
        layer.embedding_dim,
        layer.num_embeddings_padded,
        old.dtype,
        **attributes,
    )
    compat.created_anew(layer)
