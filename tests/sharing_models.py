"""Models that do odd things with their embedding: their code is read, so it is apart from that of tests."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear


def of_class(model: Path, folder: Path, cls: type) -> Path:
    """Return a copy of a checkpoint whose config.json names the class, which vLLM then finds."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(cls.__name__, cls)
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [cls.__name__]}))
    return folder


def reading() -> type:
    from vllm.model_executor.models.gemma2 import Gemma2ForCausalLM

    class GemmaThatReads(Gemma2ForCausalLM):
        def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
            table = self.model.embed_tokens
            return linear(hidden_states, table.weight)[:, : self.config.vocab_size]

    return GemmaThatReads


def with_a_head(change: Callable[[Any, Any], None]) -> type:
    """Return a class that has a head, of which `change` makes something after the model is built."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.models.gemma2 import Gemma2ForCausalLM

    class GemmaWithHead(Gemma2ForCausalLM):
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            self.lm_head = ParallelLMHead(self.config.vocab_size, self.config.hidden_size)
            change(self.lm_head, self.model.embed_tokens)

        def load_weights(self, weights: Any) -> set[str]:
            if self.lm_head.bias is not None:
                self.lm_head.bias.data.fill_(0)
            return super().load_weights(weights) | {"lm_head.weight", "lm_head.bias"}

    return GemmaWithHead


def shares(head: Any, embedding: Any) -> None:
    head.weight = embedding.weight


def shares_memory(head: Any, embedding: Any) -> None:
    head.weight = torch.nn.Parameter(embedding.weight.data, requires_grad=False)


def shares_and_has_a_bias(head: Any, embedding: Any) -> None:
    head.weight, head.bias = embedding.weight, torch.nn.Parameter(torch.zeros(256))


def shares_with_a_linear(head: Any, embedding: Any) -> None:
    head.weight = embedding.weight
    head.decoder = torch.nn.Linear(1, 1, bias=False)
    head.decoder.weight = embedding.weight


loaded_shapes: list[tuple[int, ...]] = []


def has_its_own_loader(head: Any, embedding: Any) -> None:
    usual = embedding.weight.weight_loader

    def loader(param: torch.Tensor, loaded_weight: torch.Tensor) -> None:
        loaded_shapes.append(tuple(loaded_weight.shape))
        usual(param, loaded_weight)

    embedding.weight.weight_loader = loader
    shares(head, embedding)
