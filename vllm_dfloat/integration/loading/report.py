"""The log line after loading: what was compressed, and the memory saved."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vllm_dfloat.device.packed_weight import PackedWeight
from vllm_dfloat.device.scratch import scratch
from vllm_dfloat.integration.layers.layouts import OTHERWISE
from vllm_dfloat.integration.layers.method import weights_of
from vllm_dfloat.integration.loading import offload
from vllm_dfloat.integration.loading.uncompressed import plain_parameters, uncompressed
from vllm_dfloat.integration.seam import expert_kernels, layer_kinds, offloader, places
from vllm_dfloat.integration.seam.names import logger
from vllm_dfloat.integration.seam.options import Options

GIB = 1 << 30
DEFAULT_LAYOUT = Options().layout


@dataclass(frozen=True)
class Summary:
    """Sizes of the model of one rank.

    Attributes:
        num_layers: linear layers, embeddings and routed experts (one layer per block), ignored ones included.
        num_compressed: how many of them are held compressed.
        layouts: for each layout that compressed weights are held in, a name in layouts.py, how many layers and how many
            bits per weight; that of most layers first.
        other_names: layers held in another layout than was asked for, because they would not have shrunk enough.
        is_fused: whether mode "fused" was asked for.
        fused_rows: for each layer that uses it, the largest number of rows of activations.
        fused_tokens: for each layer of experts that uses it, the largest number of tokens.
        raw_names: layers held as BF16, because coding would not have made them smaller.
        weights, packed_bytes: elements and resident bytes of the compressed layers.
        bf16_bytes: bytes of all parameters in BF16 vLLM.
        held_bytes: bytes of all parameters as held now.
        num_experts: layers of routed experts that are held compressed.
        experts_bf16_bytes, experts_bytes: their bytes in BF16 and as held.
        scratch_bytes: bytes of the scratch buffers of all slots.
        host_bytes: those of `held_bytes` that lie in host memory.
        host_names: the layers whose weights are there.
        buffer_bytes: bytes of the device into which they are copied ahead of use.
        uncompressed: name -> bytes of everything else, the largest first.
    """

    num_layers: int
    num_compressed: int
    layouts: Mapping[str, tuple[int, float]]
    other_names: tuple[str, ...]
    is_fused: bool
    fused_rows: tuple[int, ...]
    fused_tokens: tuple[int, ...]
    raw_names: tuple[str, ...]
    weights: int
    packed_bytes: int
    bf16_bytes: int
    held_bytes: int
    num_experts: int
    experts_bf16_bytes: int
    experts_bytes: int
    scratch_bytes: int
    host_bytes: int
    host_names: tuple[str, ...]
    buffer_bytes: int
    uncompressed: Mapping[str, int]

    @property
    def compressed_share(self) -> float:
        """Per cent of the bytes of all parameters in BF16 vLLM that are compressed."""
        return 200 * self.weights / max(1, self.bf16_bytes)

    @property
    def freed_bytes(self) -> int:
        """Bytes freed for the KV cache; 0 for a small model whose scratch buffers take more than compression saves."""
        on_device = self.held_bytes - self.host_bytes
        return max(0, self.bf16_bytes - on_device - self.scratch_bytes - self.buffer_bytes)

    def __str__(self) -> str:
        bits = 8 * self.packed_bytes / self.weights if self.weights else 16.0
        others = ", ".join(f"{name} {size} bytes" for name, size in self.uncompressed.items())
        return (
            f"compressed {self.num_compressed} of {self.num_layers} layers{self._layouts}, "
            f"{self.compressed_share:.2f} % of all weight bytes, {bits:.3f} bits per weight, "
            f"{self.bf16_bytes / GIB:.3f} GiB in BF16 -> {self.held_bytes / GIB:.3f} GiB, "
            f"{self.freed_bytes / GIB:.3f} GiB freed for the KV cache "
            f"({self.bf16_bytes} -> {self.held_bytes} bytes){self._experts}; "
            f"scratch {self.scratch_bytes / GIB:.3f} GiB; not compressed: {others or 'nothing'}"
        )

    @property
    def _layouts(self) -> str:
        if len(self.layouts) > 1:
            return (
                " ("
                + ", ".join(
                    f"{layers} in the {name} layout with {bits:.3f} bits per weight"
                    for name, (layers, bits) in self.layouts.items()
                )
                + ")"
            )
        return "".join(f" in the {name} layout" for name in self.layouts if name != DEFAULT_LAYOUT)

    @property
    def _experts(self) -> str:
        if not self.num_experts:
            return ""
        layers = "1 layer" if self.num_experts == 1 else f"{self.num_experts} layers"
        return (
            f"; of these the experts of {layers} {self.experts_bf16_bytes / GIB:.3f} GiB -> "
            f"{self.experts_bytes / GIB:.3f} GiB"
        )


def summarize(model: torch.nn.Module) -> Summary:
    """Return the sizes of a loaded model. Tied layers count once; a payload that two layers share counts once."""
    layers: list[Any] = [module for module in model.modules() if is_weight_layer(module)]
    compressed = [layer for layer in layers if weights_of(layer)]
    of_layers = [weight for layer in compressed for weight in weights_of(layer).values()]
    held = list({id(weight.payload): weight for weight in of_layers}.values())
    methods = [layer.quant_method for layer in compressed]
    of_experts = [layer for layer in compressed if layer_kinds.is_experts(layer)]
    experts = [weight for layer in of_experts for weight in weights_of(layer).values()]
    on_host = [
        weight
        for layer in compressed
        for name, weight in weights_of(layer).items()
        if places.is_on_host(layer, name)
    ]
    packed = [weight for weight in held if not weight.is_raw]
    plain_bytes = sum(num_bytes for _, _, num_bytes in plain_parameters(model))
    moved = {
        name.removesuffix(".weight"): num_bytes
        for name, parameter, num_bytes in plain_parameters(model)
        if offloader.is_moved(parameter)
    }
    devices = {weight.payload.device for weight in held}
    return Summary(
        num_layers=len(layers),
        num_compressed=sum(
            not all(weight.is_raw for weight in weights_of(layer).values()) for layer in compressed
        ),
        layouts=_layouts(compressed),
        other_names=tuple(m.name for m in methods if m.layout != m.asked_layout),
        is_fused=any(method.mode == "fused" for method in methods),
        fused_rows=tuple(method.fused_rows for method in methods if method.fused_rows),
        fused_tokens=tuple(most for layer in of_experts if (most := _most_tokens(layer))),
        raw_names=tuple(weight.name for weight in of_layers if weight.is_raw),
        weights=sum(weight.rows * weight.cols for weight in packed),
        packed_bytes=sum(weight.num_bytes for weight in packed),
        bf16_bytes=plain_bytes + sum(2 * w.rows * w.cols for w in held),
        held_bytes=plain_bytes
        + sum(weight.payload.nbytes for weight in held)
        + sum(weight.desc.nbytes for weight in of_layers),
        num_experts=len(of_experts),
        experts_bf16_bytes=sum(2 * weight.rows * weight.cols for weight in experts),
        experts_bytes=sum(weight.num_bytes for weight in experts),
        scratch_bytes=sum(scratch.num_bytes(device) for device in devices),
        host_bytes=sum({id(w.payload): w.payload.nbytes for w in on_host}.values())
        + sum(moved.values()),
        host_names=(*(weight.name for weight in on_host), *moved),
        buffer_bytes=offloader.buffer_bytes() if on_host else 0,
        uncompressed=uncompressed(model),
    )


def _layouts(compressed: list[Any]) -> dict[str, tuple[int, float]]:
    """Return, for each layout, how many layers it holds and its bits per weight; without matrices held as BF16."""
    layers: Counter[str] = Counter()
    held: dict[str, dict[int, PackedWeight]] = defaultdict(dict)
    for layer in compressed:
        weights = [weight for weight in weights_of(layer).values() if not weight.is_raw]
        layout = layer.quant_method.layout
        layers[layout] += bool(weights)
        held[layout] |= {id(weight.payload): weight for weight in weights}
    found = {}
    for layout, count in layers.most_common():
        if count:
            all_bytes = sum(weight.num_bytes for weight in held[layout].values())
            numel = sum(weight.rows * weight.cols for weight in held[layout].values())
            found[layout] = count, 8 * all_bytes / numel
    return found


def _most_tokens(layer: Any) -> int:
    """Return up to how many tokens a layer of compressed experts multiplies without decoding in mode "fused"."""
    method = expert_kernels.method_of(layer)
    return max(method.most_tokens) if method.mode == "fused" else 0


def is_weight_layer(module: torch.nn.Module) -> bool:
    """Return whether the module is a linear layer, an embedding, an LM head or routed experts."""
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    is_matrix = isinstance(module, LinearBase | VocabParallelEmbedding)
    return is_matrix or layer_kinds.is_experts(module)


def log_summary(model: torch.nn.Module) -> None:
    """Log what was compressed: one line per rank, one for mode "fused", and one that names layers kept as BF16."""
    summary = summarize(model)
    logger.info("dfloat11: %s", summary)
    if summary.is_fused:
        logger.info(
            "dfloat11: fused for up to %s rows of activations in %d of %d layers%s%s",
            " or ".join(map(str, sorted(set(summary.fused_rows)))) or "0",
            len(summary.fused_rows),
            summary.num_layers,
            f", experts for up to {max(summary.fused_tokens)} tokens"
            if summary.fused_tokens
            else "",
            "" if summary.fused_rows or summary.fused_tokens else "; the others are decoded",
        )
    if summary.other_names:
        logger.info(
            "dfloat11: held in the %s layout, since in the fast one they would take 14 bits per weight or more: %s",
            OTHERWISE,
            ", ".join(summary.other_names),
        )
    offload.log_offloaded(summary.host_bytes, summary.host_names, summary.buffer_bytes)
    if summary.raw_names:
        logger.info("dfloat11: held as BF16, would not shrink: %s", ", ".join(summary.raw_names))
