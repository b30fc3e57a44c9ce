"""A trainer whose weights are files, for engines whose ranks are separate processes. vLLM's workers import this."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load_file
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.model_executor.model_loader import reload

NOBODY = -1


def pairs(path: str, rank: int, failing_rank: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a checkpoint's tensors; on one rank the source raises halfway."""
    for i, pair in enumerate(load_file(f"{path}/model.safetensors").items()):
        if rank == failing_rank and i == 12:
            raise OSError(f"rank {rank} lost the trainer")
        yield pair


class Trainer:
    """vLLM's worker_extension_cls: the methods that a trainer's code adds to every worker."""

    rank: int

    def reload_from(self: Any, path: str, failing_rank: int = NOBODY) -> str:
        self.reload_weights(weights_iterator=pairs(path, self.rank, failing_rank))
        return f"rank {self.rank} reloaded"

    def read_and_reload(self: Any, path: str, failing_rank: int) -> None:
        """Fail on one rank before vLLM hears of an update."""
        name = "missing" if self.rank == failing_rank else "model"
        self.reload_weights(weights_iterator=iter(load_file(f"{path}/{name}.safetensors").items()))


@dataclass
class FileInfo:
    """The data sent: a checkpoint, the rank on which it fails, and (name, size) pairs of tensors of another shape."""

    path: str = ""
    failing_rank: int = NOBODY
    reshaped: dict[str, int] = field(default_factory=dict)


class FileTransfer(WeightTransferEngine):
    """A backend of vLLM's weight transfer that reads files; the life cycle is that of the NCCL backend."""

    init_info_cls = update_info_cls = FileInfo

    def init_transfer_engine(self, init_info: FileInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        reload.initialize_layerwise_reload(self.model)

    def receive_weights(self, info: FileInfo) -> None:
        rank = torch.distributed.get_rank()
        self.model.load_weights(
            (name, tensor.new_zeros(info.reshaped[name]) if name in info.reshaped else tensor)
            for name, tensor in pairs(info.path, rank, info.failing_rank)
        )

    def finish_weight_update(self) -> None:
        reload.finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


WeightTransferEngineFactory.register_engine("files", FileTransfer)
