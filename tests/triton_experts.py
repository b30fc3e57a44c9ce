"""vLLM's Triton kernels for experts on a CPU, in Triton's interpreter: in a process of their own.

    python triton_experts.py CASE FOLDER      # exit status 0 if compressed experts give the bits of BF16 ones

vLLM's CPU build turns Triton off where it imports it, so this must run before. Its kernels for experts, and those for
LoRA, then run as they do on a GPU, but for rounding. Of vLLM's compiled ops the CPU build lacks three: they sort
tokens by experts (and by adapters), and add what the experts of a token gave. They are written here in PyTorch, for
BF16 and compressed alike.
"""

import os
import sys
from types import SimpleNamespace
from typing import Any

os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "VLLM_DFLOAT_BACKEND": "numba"}

from compiled_target import TARGET

if TARGET:
    import ptx_plugin  # noqa: F401  (compiles the kernels, vLLM's too, instead of interpreting them)

import torch
from triton.backends import backends

backends.setdefault("cpu", SimpleNamespace(driver=SimpleNamespace(is_active=lambda: False)))  # type: ignore[arg-type]

from vllm import _custom_ops as ops  # noqa: E402
from vllm.triton_utils import HAS_TRITON  # noqa: E402

del backends["cpu"]
assert HAS_TRITON

import contextlib  # noqa: E402
import dataclasses  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from unittest import mock  # noqa: E402

import architectures  # noqa: E402
import quick_interpreter  # noqa: E402
from expert_layers import DFLOAT11, FAST, experts_of, values  # noqa: E402
from helpers import same_bits  # noqa: E402
from model_loads import loaded  # noqa: E402

from vllm_dfloat.device.scratch import scratch  # noqa: E402
from vllm_dfloat.integration.layers.experts import DFloat11ExpertsMethod  # noqa: E402

quick_interpreter.install()

NUM_EXPERTS, TOP_K, TOKENS = 32, 2, 4
NUM_ADAPTERS, RANK = 4, 8
SMALL = dict(
    num_hidden_layers=1, num_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K, moe_intermediate_size=32,
)  # fmt: skip


def moe_sum(input: torch.Tensor, output: torch.Tensor, ids: Any = None, experts: Any = None) -> None:  # fmt: skip
    """Add the products of each token's experts [tokens, top_k, hidden], of those on this rank only."""
    if experts is not None:
        input = torch.where((experts[ids.long()] >= 0)[..., None], input, 0)
    output.copy_(input.sum(1, dtype=torch.float32))


def moe_align_block_size(
    ids: torch.Tensor, num_experts: int, block: int, sorted_ids: torch.Tensor,
    expert_ids: torch.Tensor, num_padded: torch.Tensor, expert_map: Any = None, places: Any = None,
) -> None:  # fmt: skip
    """Sort tokens by experts, each filled up to whole blocks, other ranks' left out; write each block's expert."""
    flat, at = ids.view(-1).long(), 0
    local = torch.arange(num_experts) if expert_map is None else expert_map
    sorted_ids.fill_(flat.numel())
    expert_ids.fill_(-1)
    for expert in flat.unique().tolist():
        (mine,) = (flat == expert).nonzero(as_tuple=True)
        blocks = -(-mine.numel() // block)
        if local[expert] >= 0:
            sorted_ids[at * block : at * block + mine.numel()] = mine.int()
            expert_ids[at : at + blocks] = local[expert]
            at += blocks
    num_padded.fill_(at * block)


def moe_lora_align_block_size(
    ids: torch.Tensor, adapter_of: torch.Tensor, num_experts: int, block: int, max_loras: int, padded: int, blocks: int,
    sorted_ids: torch.Tensor, expert_ids: torch.Tensor, num_padded: torch.Tensor, enabled: torch.Tensor,
    adapters: torch.Tensor, expert_map: Any = None,
) -> None:  # fmt: skip
    """Sort the tokens of each adapter by experts, as moe_align_block_size, each adapter's in a part of its own."""
    sorted_ids.fill_(ids.numel())
    num_padded.zero_()
    local = torch.arange(num_experts) if expert_map is None else expert_map
    for adapter in adapters.tolist():
        if adapter < 0 or not enabled[adapter]:
            continue
        mine = (adapter_of[: len(ids)] == adapter)[:, None].expand_as(ids)
        others = torch.cat(
            [local, torch.tensor([-1])]
        )  # those of other adapters have an expert of no rank
        moe_align_block_size(
            ids.where(mine, num_experts), num_experts, block, sorted_ids[adapter * padded : (adapter + 1) * padded],
            expert_ids[adapter * blocks : (adapter + 1) * blocks], num_padded[adapter : adapter + 1], others,
        )  # fmt: skip


class AsOnGPU:
    """vLLM's platform, but for one answer: whether there are kernels for experts that are not gated."""

    def __getattr__(self, name: str) -> Any:
        from vllm.platforms import current_platform

        return getattr(current_platform, name)

    def is_cuda_alike(self) -> bool:
        return True


@contextlib.contextmanager
def on_triton(**parallel: Any) -> Iterator[None]:
    """Make vLLM choose its Triton kernel for experts; `parallel` says which rank of expert parallelism this is."""
    from vllm.model_executor.layers.fused_moe import config
    from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
    from vllm.model_executor.layers.fused_moe.oracle import unquantized
    from vllm.v1.worker import workspace

    make = FusedMoEParallelConfig.make
    changed = lambda *a, **k: dataclasses.replace(make(*a, **k), **parallel)  # noqa: E731
    chosen = unquantized.UnquantizedMoeBackend.TRITON
    with (
        mock.patch.object(FusedMoEParallelConfig, "make", changed),
        mock.patch.object(unquantized, "_get_priority_backends", return_value=[chosen]),
        mock.patch.object(TritonExperts, "_supports_current_device", return_value=True),
        mock.patch.object(config, "current_platform", AsOnGPU()),
        mock.patch.object(ops, "moe_sum", moe_sum),
        mock.patch.object(ops, "moe_align_block_size", moe_align_block_size),
        mock.patch.object(ops, "moe_lora_align_block_size", moe_lora_align_block_size),
    ):
        workspace.init_workspace_manager(torch.device("cpu"))  # vLLM 0.28 has none on a CPU
        try:
            yield
        finally:
            workspace.reset_workspace_manager()


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill the scratch with NaN before every layer."""
    take = scratch.take

    def poison(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, status = take(*args)
        return out.fill_(float("nan")), status

    with mock.patch.object(scratch, "take", poison):
        yield


def inputs(layer: Any, tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return activations, and the weights and ids of the experts of each token."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, layer.hidden_size, generator=generator).bfloat16()
    logits = torch.randn(tokens, layer.global_num_experts, generator=generator)
    weights, ids = torch.softmax(logits, -1).topk(TOP_K)
    return x, weights, ids.int()


def multiply(layer: Any, tokens: int = TOKENS) -> torch.Tensor:
    return layer.quant_method.apply(layer, *inputs(layer, tokens), None, None).clone()


def both(path: Path, tokens: int = TOKENS, prepare: Any = None, **settings: Any) -> torch.Tensor:
    """Check that compressed experts give what BF16 experts give, and return it."""
    answers, held = [], []
    for options in ({}, DFLOAT11, FAST):
        with loaded(path, **options, **settings) as model:
            layer = experts_of(model)
            if prepare is not None:
                prepare(model)
            method = getattr(layer.quant_method, "old_quant_method", layer.quant_method)
            assert isinstance(method, DFloat11ExpertsMethod) == bool(options)
            assert method.unquantized_backend.name == "TRITON"
            held.append(values(layer) if prepare is None else [])
            with poisoned() if options else contextlib.nullcontext():
                answers.append(multiply(layer, tokens))
    assert not answers[0].isnan().any()
    assert answers[0].float().abs().max() > 0
    assert all(same_bits(answer, answers[0]) for answer in answers[1:])
    for one in held[1:]:
        assert all(same_bits(*pair) for pair in zip(one, held[0], strict=True))
    return answers[0]


def made(folder: Path, name: str = "Qwen3Moe", **changes: Any) -> Path:
    entries = {**architectures.SHAPE, **SMALL, **changes}
    return architectures.save(f"{name}ForCausalLM", folder, entries)


def gated(folder: Path) -> None:
    """Few tokens, which the kernel does not sort, and many."""
    path = made(folder)
    with on_triton():
        both(path)
        both(path, tokens=40)


def not_gated(folder: Path) -> None:
    """Experts of one projection up and one down, as NemotronH has them."""
    blocks = ["linear_attention", "moe"]
    path = made(
        folder, "NemotronH", num_hidden_layers=2, layers_block_type=blocks, n_routed_experts=NUM_EXPERTS,
        moe_shared_expert_intermediate_size=64, mamba_num_heads=4, mamba_head_dim=64, ssm_state_size=16, n_groups=1,
    )  # fmt: skip
    with on_triton():
        both(path)
        both(path, tokens=40)


def ranks(folder: Path) -> None:
    """Ranks of expert parallelism, with vLLM's own maps: each adds what its experts give, as in BF16."""
    path = made(folder)
    with on_triton():
        whole = both(path, tokens=20)
    for size in (2, 4):
        parts = []
        for rank in range(size):
            with on_triton(ep_size=size, ep_rank=rank, use_ep=True):
                parts.append(both(path, tokens=20))
        with loaded(path) as model:
            _, _, ids = inputs(experts_of(model), 20)
        owners = ids // (NUM_EXPERTS // size)
        one_rank = owners[:, 0] == owners[:, 1]
        assert one_rank.any()
        assert not one_rank.all()
        total = torch.stack(parts).float().sum(0).bfloat16()
        assert same_bits(total[one_rank], whole[one_rank])
        assert all(part.count_nonzero() for part in parts)


def adapters(folder: Path) -> None:
    """LoRA on experts: three tokens with two adapters, and one without."""
    path = made(folder)
    with on_triton():
        without = both(path)
        settings = dict(enable_lora=True, max_loras=NUM_ADAPTERS, max_lora_rank=RANK)
        found = both(path, prepare=adapt, **settings)
        changed = (found != without).any(1)
        assert changed.tolist() == [True, True, False, True]


def adapters_of_ranks(folder: Path) -> None:
    """LoRA on the experts of a rank of expert parallelism, with the adapters' parts for these experts."""
    path = made(folder)
    settings = dict(enable_lora=True, max_loras=NUM_ADAPTERS, max_lora_rank=RANK)
    for rank in range(2):
        with on_triton(
            ep_size=2, ep_rank=rank, use_ep=True, all2all_backend="allgather_reducescatter"
        ):
            without = both(path)
            found = both(path, prepare=adapt, **settings)
            changed = (found != without).any(1).tolist()
            assert any(changed)
            assert not changed[2]  # the token without an adapter


def adapt(model: torch.nn.Module) -> None:
    """Do to the layer of experts what vLLM's manager of adapters does, and say which adapter each token has."""
    from vllm.config import get_current_vllm_config
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.layers.fused_moe import FusedMoEWithLoRA
    from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    config = get_current_vllm_config()
    runner = next(module for module in model.modules() if isinstance(module, MoERunner))
    layer = FusedMoEWithLoRA(runner)
    layer.create_lora_weights(NUM_ADAPTERS, config.lora_config, config.model_config.hf_config)
    generator = torch.Generator().manual_seed(5)
    hidden, inner = layer.hidden_size, layer.intermediate_size_per_partition
    count = layer.local_num_experts
    own = slice(layer.ep_rank * count, (layer.ep_rank + 1) * count)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(NUM_EXPERTS, *shape, generator=generator).mul_(0.05).bfloat16()[own]

    for index in range(2):
        down = [random(RANK, hidden), random(RANK, inner), random(RANK, hidden)]
        up = [random(inner, RANK), random(hidden, RANK), random(inner, RANK)]
        layer.set_lora(index, down, up)
    wrapper = PunicaWrapperGPU(64, 8, "cpu", lora_config=config.lora_config)
    tokens = (7, 9, 0, 7)
    names = [7, 9, *[None] * (NUM_ADAPTERS - 2)]
    wrapper.update_metadata(LoRAMapping(tokens, tokens, True), names, NUM_ADAPTERS, 260)
    layer.set_mapping(wrapper)


CASES = {case.__name__: case for case in (gated, not_gated, ranks, adapters, adapters_of_ranks)}

if __name__ == "__main__":
    CASES[sys.argv[1]](Path(sys.argv[2]))
    os._exit(0)  # without what process groups and Triton do at exit
