"""A model of one linear layer and an LM head that is larger, as vLLM loads it, for tests without an engine."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from model_loads import group_of_one
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers import vocab_parallel_embedding as vllm_embedding

from vllm_dfloat.device.scratch import scratch
from vllm_dfloat.integration.config import DFloat11Config
from vllm_dfloat.integration.layers import (
    head_op,
    head_proof,
    heads,
    linear_op,
    product_proof,
    proof_cache,
    proven_products,
)
from vllm_dfloat.integration.seam import compat
from vllm_dfloat.integration.seam.options import Options

ROWS, COLS = 2048, 256
CPU = torch.device("cpu")
SLAB = 512 * COLS * 2  # bytes of a quarter of the head


@contextmanager
def loading(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[None]:
    """Stand where vLLM loads a model: one rank, BF16, a current config; nothing is known from other tests."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    scratch.release()
    head_op.known.clear()
    monkeypatch.setattr(proof_cache, "folder", lambda: folder)
    monkeypatch.setattr(compat, "is_last_stage", lambda: True)
    with set_current_vllm_config(VllmConfig()), group_of_one():
        yield
    torch.set_default_dtype(before)
    scratch.release()


def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).mul(std).bfloat16()  # fmt: skip


def settings(most: int = 40, **changes: Any) -> Any:
    scheduler = SimpleNamespace(max_num_seqs=6, max_num_batched_tokens=most)
    return SimpleNamespace(**{"scheduler_config": scheduler, "speculative_config": None, **changes})


class Tiny(torch.nn.Module):
    """One linear layer of an eighth of the head, and the head."""

    def __init__(self, options: Options, bias: bool) -> None:
        super().__init__()
        config = DFloat11Config(options)
        config._started = True
        self.linear = vllm_linear.ReplicatedLinear(
            COLS, ROWS // 8, bias=False, quant_config=config, prefix="linear"
        )
        self.lm_head = vllm_embedding.ParallelLMHead(
            ROWS, COLS, bias=bias, quant_config=config, prefix="lm_head"
        )


def loaded(bias: bool = False, **options: Any) -> Tiny:
    """Return the model with its weights packed."""
    model = Tiny(Options(**{"slab": SLAB, **options}), bias)
    model.linear.weight.weight_loader(model.linear.weight, normal(ROWS // 8, COLS, std=0.02))
    model.lm_head.weight.weight_loader(model.lm_head.weight, normal(ROWS, COLS, std=0.02))
    if bias:
        model.lm_head.bias.weight_loader(model.lm_head.bias, normal(ROWS))
    for layer in (model.linear, model.lm_head):
        layer.quant_method.process_weights_after_loading(layer)
    return model


def prepared(bias: bool = False, vllm: Any = None, **options: Any) -> Tiny:
    model = loaded(bias, **options)
    proven_products.prepare(model, None)
    heads.prepare(model, vllm or settings(), None)
    return model


def logits(model: Tiny, x: torch.Tensor) -> torch.Tensor:
    head = model.lm_head
    return head.quant_method.apply(head, x, head.bias)


def expected(model: Tiny, x: torch.Tensor) -> torch.Tensor:
    head = model.lm_head
    gemm = head_op.find_gemm(head.quant_method.gemm)
    return gemm(x, normal(ROWS, COLS, std=0.02), head.bias)


def known() -> head_op.Known:
    (found,) = head_op.known.values()
    return found


def shape_dependent(differs: Callable[[int], bool]) -> Any:
    """Return a GEMM that adds in another order if the weight is a part of the head and `differs(rows of x)`."""

    def gemm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        x, weight = x.float(), weight.float()
        parts = 3 if weight.shape[0] < ROWS and differs(x.shape[0]) else 1
        columns = torch.arange(COLS).tensor_split(parts)
        y = torch.stack([x[:, part] @ weight[:, part].T for part in columns]).sum(0)
        return (y if bias is None else y + bias.float()).bfloat16()

    return lambda name: gemm


def use(monkeypatch: pytest.MonkeyPatch, gemm: Any) -> None:
    for module in (head_op, head_proof, linear_op, product_proof):
        monkeypatch.setattr(module, "find_gemm", gemm)


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the list of the numbers of rows for which the whole head is decoded from now on."""
    decoded: list[int] = []
    whole = head_op.whole_buffers
    monkeypatch.setattr(
        head_op, "whole_buffers", lambda *a: decoded.append(a[-1]) or whole(*a)
    )  # fmt: skip
    return decoded
