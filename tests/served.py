"""A running engine whose weights tests change in the ways of trainers and tools."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from engines import ask
from safetensors.torch import load_file
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.model_executor.model_loader import reload

from vllm_dfloat.integration.layers.placeholder import WeightPlaceholder

ATTENTION = "model.layers.0.self_attn"
QKV, O_PROJ, DOWN = f"{ATTENTION}.qkv_proj", f"{ATTENTION}.o_proj", "model.layers.0.mlp.down_proj"
NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens"
MLP = "model.layers.1.mlp"
K = f"{ATTENTION}.k_proj.weight"
AS_BEFORE = "All weights are as before"
HOW = "held compressed; nothing was read or changed. To change it, .*reload_weights"

Tensors = dict[str, torch.Tensor]
Pairs = list[tuple[str, torch.Tensor]]
Change = Callable[[Tensors, Tensors], Tensors]  # (first checkpoint, second) -> what is written

NUM_TOKENS = 4


@dataclass
class TransferInfo:
    """The data that a trainer sends: nothing at the start, then weights."""

    weights: Pairs = field(default_factory=list)


class InProcessTransfer(WeightTransferEngine):
    """A backend of vLLM's weight transfer whose trainer is this process; the life cycle is that of the NCCL backend."""

    init_info_cls = update_info_cls = TransferInfo

    def init_transfer_engine(self, init_info: TransferInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        reload.initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: TransferInfo) -> None:
        self.model.load_weights(update_info.weights)

    def finish_weight_update(self) -> None:
        reload.finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


class Served:
    """A running engine and two checkpoints: the one it was started from, and another one."""

    def __init__(self, llm: Any, first: Path, second: Path) -> None:
        self.llm = llm
        self.first, self.second = first, second
        self.worker = llm.llm_engine.model_executor.driver_worker.worker
        self.model = self.worker.model_runner.get_model()
        self.old: Tensors = load_file(first / "model.safetensors")
        self.new: Tensors = load_file(second / "model.safetensors")
        self.answers = self.ask()

    def ask(self) -> Any:
        return ask(self.llm, num_tokens=NUM_TOKENS)

    @torch.no_grad()  # vLLM itself does not set it when it copies a kernel's format
    def reload(self, **arguments: Any) -> None:
        self.llm.collective_rpc("reload_weights", kwargs=arguments)

    def iterate(self, pairs: Any, **arguments: Any) -> None:
        self.reload(weights_iterator=iter(pairs), **arguments)

    def transfer(self, *chunks: Pairs) -> None:
        self.send(chunks)

    def send(self, chunks: Iterable[Pairs]) -> None:
        """Send chunks of weights from start to finish; after a failure nothing more is sent."""
        self.llm.collective_rpc("start_weight_update")
        for chunk in chunks:
            self.llm.collective_rpc("update_weights", kwargs={"update_info": {"weights": chunk}})
        self.llm.collective_rpc("finish_weight_update")

    def some(self, part: str) -> Pairs:
        return [(name, tensor) for name, tensor in self.new.items() if part in name]

    def layer(self, name: str) -> Any:
        return self.model.get_submodule(name)

    def parameter(self, name: str) -> Any:
        return dict(self.model.named_parameters())[name]

    def bits(self) -> Tensors:
        """Return every weight as the engine serves it."""
        found = {}
        for name, parameter in self.model.named_parameters():
            layer = self.layer(name.rpartition(".")[0])
            is_packed = isinstance(parameter, WeightPlaceholder)
            value = layer.quant_method.dequantize_weight(layer) if is_packed else parameter
            found[name] = value.detach().clone()
        return found


def fails_after(pairs: Pairs) -> Iterator[tuple[str, torch.Tensor]]:
    yield from pairs
    raise OSError("the trainer is gone")


def from_one_buffer(pairs: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield pairs whose tensors lie in the same memory, one after the other."""
    pairs = list(pairs)
    buffer = torch.empty(max(tensor.numel() for _, tensor in pairs), dtype=torch.bfloat16)
    for name, tensor in pairs:
        yield name, buffer[: tensor.numel()].view(tensor.shape).copy_(tensor)
    buffer.fill_(torch.nan)
