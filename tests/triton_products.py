"""Compressed experts in modes "fused" and "fused-exact" under vLLM's Triton kernels, as in triton_experts.py.

    python triton_products.py CASE FOLDER

Triton's interpreter multiplies as tensor_cores.py does, and rounds to BF16 as a GPU. Within 128 columns, a step of
vLLM's kernel here, both products add in the same order, so both modes give the bits of BF16 experts there. Beyond,
interpreted vLLM begins a new sum in each step, as no compiled kernel does: a product that is not equal.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from unittest import mock

import triton_experts as on_cpu  # first: it sets the environment of Triton and vLLM

# isort: split
import numpy as np
import pytest
import torch
from expert_layers import experts_of
from helpers import same_bits
from model_loads import loaded
from tensor_cores import from_bf16, interpret_with_them
from triton_experts import adapt, made, multiply, on_triton

from vllm_dfloat.device.scratch import scratch
from vllm_dfloat.integration.layers import experts_product, proof_cache, proven_experts
from vllm_dfloat.integration.layers.layouts import BY_NAME, Layout
from vllm_dfloat.integration.layers.method import weights_of

NUM_EXPERTS, MOST = 8, 4
SMALL = dict(hidden_size=128, num_experts=NUM_EXPERTS, moe_intermediate_size=128)
ALONE, SORTED, MANY = (
    1,
    4,
    MOST + 1,
)  # tokens: each in a block of its own, sorted by experts, decoded
MODES = ("fused", "fused-exact")
POISON = -0x5A5B  # bits of the scratch, no BF16 that a model has


def bf16_of(values: np.ndarray) -> np.ndarray:
    """Return the bits of FP32 numbers, rounded to the nearest BF16."""
    return torch.from_numpy(values.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)


def round_as_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """Make Triton's interpreter round to BF16, where it cuts off, and add BF16 numbers, where it adds their bits."""
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    convert, add = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fadd

    def rounded(self: Any, x: Any, dtype: Any) -> Any:
        if (x.dtype.scalar, dtype.scalar) != (float32, bfloat16):
            return convert(self, x, dtype)
        return TensorHandle(bf16_of(x.data), bfloat16)

    def added(self: Any, a: Any, b: Any) -> Any:
        if a.dtype.scalar != bfloat16:
            return add(self, a, b)
        return TensorHandle(bf16_of(from_bf16(a.data) + from_bf16(b.data)), bfloat16)

    patch.setattr(InterpreterBuilder, "cast_impl", rounded)
    patch.setattr(InterpreterBuilder, "create_fadd", added)


@contextlib.contextmanager
def tensor_cores(folder: Path) -> Iterator[list[int]]:
    """Run Triton's kernels on tensor cores in a model; give a list of the tokens of each product without decoding."""
    held, tokens = BY_NAME["fast"], list[int]()
    assert held.experts_product is not None
    of = held.experts_product

    def launch(*given: Any) -> None:
        tokens.append(given[5].num_tokens)
        of.launch(*given)

    watched = replace(of, max_tokens=lambda *sizes: MOST, launch=launch)
    with pytest.MonkeyPatch.context() as patch:
        interpret_with_them(patch)
        round_as_a_gpu(patch)
        patch.setattr(proof_cache, "folder", lambda: folder / "proofs")
        patch.setattr(experts_product, "known", {})
        patch.setitem(
            cast(dict[str, Layout], BY_NAME), "fast", replace(held, experts_product=watched)
        )
        yield tokens


def options(mode: str) -> dict[str, Any]:
    additional = {"dfloat11": {"layout": "fast", "mode": mode}}
    return dict(quantization="dfloat11", additional_config=additional)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill the scratch with a value of its own before every layer."""
    take = scratch.take

    def poison(*given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, status = take(*given)
        out.view(torch.int16).fill_(POISON)
        return out, status

    with mock.patch.object(scratch, "take", poison):
        yield


def is_decoded(layer: Any) -> list[bool]:
    """Return whether w13 and w2 were written to the scratch by the last layer."""
    out, _ = scratch._buffers[torch.device("cpu"), 0]
    found = []
    for weight in weights_of(layer).values():
        numel = BY_NAME["fast"].scratch_numel(weight.rows, weight.cols)
        found.append(bool((out[:numel].view(torch.int16) != POISON).any()))
        out = out[numel:]
    return found


def answers(
    path: Path, counts: tuple[int, ...], prepare: Any = None, **settings: Any
) -> list[torch.Tensor]:
    """Return what BF16 experts make of so many tokens."""
    with loaded(path, **settings) as model:
        if prepare is not None:
            prepare(model)
        return [multiply(experts_of(model), tokens) for tokens in counts]


def check(
    path: Path,
    folder: Path,
    counts: tuple[int, ...] = (ALONE, SORTED, MANY),
    prepare: Any = None,
    **settings: Any,
) -> None:
    """Check that both modes give the bits of BF16 experts, and that few tokens are multiplied without decoding."""
    with tensor_cores(folder) as launched:
        expected = answers(path, counts, prepare, **settings)
        assert all(answer.float().abs().max() > 0 for answer in expected)
        for mode in ("exact", *MODES):
            with loaded(path, **options(mode), **settings) as model:
                layer = experts_of(model)
                if prepare is not None:
                    prepare(model)
                for tokens, answer in zip(counts, expected, strict=True):
                    launched.clear()
                    with poisoned():
                        found = multiply(layer, tokens)
                    assert same_bits(found, answer), (mode, tokens)
                    is_few = mode in MODES and tokens <= MOST
                    assert launched == ([tokens] * 2 if is_few else []), (mode, tokens)
                    assert is_decoded(layer) == [not is_few] * 2, (mode, tokens)


def gated(folder: Path) -> None:
    """Tokens with a block each, sorted ones, and more than are multiplied so."""
    check(made(folder / "m", **SMALL), folder)


def not_gated(folder: Path) -> None:
    """Experts of one projection up and one down, as NemotronH has them."""
    blocks = ["linear_attention", "moe"]
    path = made(
        folder / "m", "NemotronH", num_hidden_layers=2, layers_block_type=blocks, n_routed_experts=NUM_EXPERTS,
        moe_shared_expert_intermediate_size=64, mamba_num_heads=4, mamba_head_dim=64, ssm_state_size=16, n_groups=1,
        hidden_size=128, moe_intermediate_size=128,
    )  # fmt: skip
    with on_triton():
        check(path, folder, (ALONE, SORTED))


def weighted_input(folder: Path) -> None:
    """The router's weight goes onto the input, as in Llama 4: the second product does without it."""
    path = made(folder / "m", num_experts_per_tok=1, **SMALL)

    def weigh(model: torch.nn.Module) -> None:
        experts_of(model).apply_router_weight_on_input = True
        proven_experts.prepare(model)  # as after loading a model that says so

    with mock.patch.object(on_cpu, "TOP_K", 1):
        check(path, folder, (ALONE, SORTED), weigh)


def swigluoai_and_mul(
    out: torch.Tensor, x: torch.Tensor, alpha: float = 1.702, limit: float = 7.0
) -> None:
    """The activation of gpt-oss, for BF16 and compressed experts alike; vLLM's CPU build lacks it."""
    gate = x[..., ::2].float().clamp(max=limit)
    up = x[..., 1::2].float().clamp(-limit, limit)
    out.copy_((up + 1) * gate * torch.sigmoid(alpha * gate))


def biased(folder: Path) -> None:
    """Experts with biases, as gpt-oss has them."""
    library = torch.library.Library("_C", "FRAGMENT")
    library.define(
        "swigluoai_and_mul(Tensor! out, Tensor x, float alpha=1.702, float limit=7.0) -> ()"
    )
    library.impl("swigluoai_and_mul", swigluoai_and_mul, "CPU")
    path = made(folder / "m", "GptOss", hidden_size=128, intermediate_size=128, num_local_experts=8)
    check(path, folder, (ALONE, SORTED))


def unequal(folder: Path) -> None:
    """A product that is not equal is decoded in mode "fused-exact", beside one that is not."""
    path = made(folder / "m", **{**SMALL, "moe_intermediate_size": 256})
    with tensor_cores(folder) as launched:
        (expected,) = answers(path, (SORTED,))
        for mode, products in (("fused", 2), ("fused-exact", 1)):
            with loaded(path, **options(mode)) as model:
                layer = experts_of(model)
                launched.clear()
                with poisoned():
                    found = multiply(layer, SORTED)
                assert mode == "fused" or same_bits(found, expected)
                assert torch.allclose(found.float(), expected.float(), rtol=0.05, atol=1e-3)
                assert launched == [SORTED] * products
                assert is_decoded(layer) == [False, products == 1]


def ranks(folder: Path) -> None:
    """Ranks of expert parallelism, where tokens of other ranks' experts are left out."""
    path = made(folder / "m", **SMALL)
    for rank in range(2):
        with on_triton(ep_size=2, ep_rank=rank, use_ep=True):
            check(path, folder, (ALONE, SORTED))


def adapters(folder: Path) -> None:
    """LoRA on experts, whose additions stay vLLM's."""
    path = made(folder / "m", **SMALL)
    settings = dict(enable_lora=True, max_loras=on_cpu.NUM_ADAPTERS, max_lora_rank=on_cpu.RANK)
    check(path, folder, (on_cpu.TOKENS,), adapt, **settings)


def adapters_of_ranks(folder: Path) -> None:
    """The same on a rank of expert parallelism: blocks of other ranks' experts become 0."""
    path = made(folder / "m", **SMALL)
    settings = dict(enable_lora=True, max_loras=on_cpu.NUM_ADAPTERS, max_lora_rank=on_cpu.RANK)
    with on_triton(ep_size=2, ep_rank=1, use_ep=True, all2all_backend="allgather_reducescatter"):
        check(path, folder, (on_cpu.TOKENS,), adapt, **settings)


def update(folder: Path) -> None:
    """New weights take effect under the same descriptor, in products that were settled before; damage gives NaN."""
    from safetensors.torch import load_file

    path = made(folder / "m", **SMALL)
    new = {n: t.neg() for n, t in load_file(path / "model.safetensors").items() if ".experts." in n}
    with tensor_cores(folder) as launched:
        with loaded(path) as model:
            model.load_weights(list(new.items()))
            expected = multiply(experts_of(model), SORTED)
        with loaded(path, **options("fused-exact")) as model:
            layer = experts_of(model)
            assert not same_bits(multiply(layer, SORTED), expected)
            model.load_weights(list(new.items()))
            launched.clear()
            with poisoned():
                assert same_bits(multiply(layer, SORTED), expected)
            assert launched == [SORTED] * 2
            assert is_decoded(layer) == [False, False]
            compiles(layer, launched)
            desc = layer.__dict__["dfloat11_desc_w2_weight"]
            desc[0] += 1
            assert multiply(layer, SORTED).isnan().all()
            desc[0] -= 1
            assert same_bits(multiply(layer, SORTED), expected)


def compiles(layer: Any, launched: list[int]) -> None:
    """Check that every form of kernel is used once where kernels are compiled, as on a GPU after loading."""
    launched.clear()
    products = proven_experts.products_of(layer, layer.quant_method)
    for _ in range(2):
        proven_experts.compile_kernels(products, layer.quant_method.held)
    # w13, and w2 with the router's weights; tokens alone, and up to 8 sorted.
    assert launched == [ALONE, ALONE, MOST, MOST]


_ON_RANKS = (ranks, adapters_of_ranks)
_ALL = (gated, not_gated, weighted_input, biased, unequal, adapters, update, *_ON_RANKS)
CASES = {case.__name__: case for case in _ALL}

if __name__ == "__main__":
    with on_triton():
        on_cpu.NUM_EXPERTS = NUM_EXPERTS
        CASES[sys.argv[1]](Path(sys.argv[2]))
    os._exit(0)  # without what process groups and Triton do at exit
