"""Layers in mode "fused-exact": multiplied without decoding where that has the bits of vLLM's product, and only there.

vLLM's product is its own kernel for VLLM_BATCH_INVARIANT, interpreted, on tensor cores in a model.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
import vllm_matmul
from helpers import gaussian, same_bits, to_torch
from model_loads import group_of_one
from tensor_cores import interpret_with_them
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers import vocab_parallel_embedding as vllm_embedding

from vllm_dfloat.device.scratch import scratch
from vllm_dfloat.integration.config import DFloat11Config
from vllm_dfloat.integration.layers import (
    cancelling,
    head_op,
    head_proof,
    heads,
    in_order,
    linear_op,
    product_proof,
    proof_cache,
    proven_products,
)
from vllm_dfloat.integration.layers.layouts import BY_NAME, Layout
from vllm_dfloat.integration.layers.method import packed_of
from vllm_dfloat.integration.seam import compat, gemms
from vllm_dfloat.integration.seam.options import Options

ROWS, COLS, MOST = 96, 128, 3
Gemm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
CPU_GEMM = linear_op.find_gemm("auto")


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return vllm_matmul.load(tmp_path_factory.mktemp("vllm"))


@pytest.fixture
def vllm_gemm(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Gemm:
    interpret_with_them(monkeypatch)
    kernel = module.matmul_kernel_persistent
    return lambda x, weight, bias: vllm_matmul.linear(kernel, x, weight, bias)


@pytest.fixture(autouse=True)
def in_vllm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> Iterator[None]:
    """Stand where vLLM loads a model under VLLM_BATCH_INVARIANT; kernels take up to MOST rows of activations."""
    caplog.set_level("INFO", "vllm.dfloat11")
    monkeypatch.setenv("VLLM_DFLOAT_BACKEND", "triton")
    monkeypatch.setattr(gemms, "is_batch_invariant", lambda: True)
    monkeypatch.setattr(gemms, "adds_bias_to_rounded", lambda: False)  # as the kernel in the model
    monkeypatch.setattr(linear_op, "settle_bias", lambda layer: None)  # it changes biases on a CPU
    monkeypatch.setattr(in_order, "known", {})
    monkeypatch.setattr(proof_cache, "folder", lambda: tmp_path / "proofs")
    held = BY_NAME["fast"]
    assert held.in_order is not None
    few = replace(held, in_order=replace(held.in_order, max_rows=lambda *of: MOST))
    monkeypatch.setitem(cast(dict[str, Layout], BY_NAME), "fast", few)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with set_current_vllm_config(VllmConfig()), group_of_one():
        yield
    torch.set_default_dtype(before)


def use(monkeypatch: pytest.MonkeyPatch, gemm: Gemm) -> None:
    for user in (linear_op, product_proof):
        monkeypatch.setattr(user, "find_gemm", lambda name: gemm)


def layer_of(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    """Return a layer after loading and after the proofs."""
    layer = vllm_linear.ColumnParallelLinear(
        COLS, ROWS, bias=bias is not None, skip_bias_add=False, prefix="layer",
        quant_config=DFloat11Config(Options(layout="fast", mode="fused-exact")),
    )  # fmt: skip
    layer.weight.weight_loader(layer.weight, weight)
    if bias is not None:
        layer.bias.weight_loader(layer.bias, bias)
    layer.quant_method.process_weights_after_loading(layer)  # as vLLM does after the last layer
    proven_products.prepare(torch.nn.ModuleList([layer]), None)
    return layer


def decoding(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with each weight that is decoded from now on."""
    decoded: list[int] = []
    held = BY_NAME["fast"]
    watched = replace(held, decode=lambda *a: decoded.append(1) or held.decode(*a))
    monkeypatch.setitem(cast(dict[str, Layout], BY_NAME), "fast", watched)
    return decoded


def activations(num_x: int) -> torch.Tensor:
    return torch.randn(num_x, COLS, generator=torch.Generator().manual_seed(num_x)).bfloat16()


WEIGHT, BIAS = to_torch(gaussian(ROWS, COLS)), to_torch(gaussian(1, ROWS, seed=9))[0]


@pytest.mark.parametrize("bias", [None, BIAS])
def test_proven_products_are_not_decoded_and_have_the_bits_of_vllm(
    bias: torch.Tensor | None,
    vllm_gemm: Gemm,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    use(monkeypatch, vllm_gemm)
    layer = layer_of(WEIGHT, bias)
    assert (
        "for 1 of 1 shapes of matrices, which are multiplied without decoding: [96, 128] at 3 of 3"
        in caplog.text
    )
    decoded = decoding(monkeypatch)
    for num_x in range(1, MOST + 1):
        x = activations(num_x)
        assert same_bits(layer(x)[0], vllm_gemm(x, WEIGHT, bias))
        assert same_bits(layer(x[:, None])[0], vllm_gemm(x, WEIGHT, bias)[:, None])
    assert not decoded
    x = activations(MOST + 1)
    assert same_bits(layer(x)[0], vllm_gemm(x, WEIGHT, bias))
    assert decoded == [1]


def test_a_product_that_is_rounded_before_the_bias_is_added_is_not_taken_for_equal(
    vllm_gemm: Gemm, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Bug caught: sums that cancel leave BF16 numbers, which rounding does not change.
    zero = torch.zeros(1, dtype=torch.bfloat16)
    use(monkeypatch, lambda x, w, bias: vllm_gemm(x, w, None) + (zero if bias is None else bias))
    layer_of(WEIGHT, BIAS)
    assert "for none of 1 shapes of matrices" in caplog.text
    x, weight, _ = cancelling.operands(2, ROWS, COLS, None, torch.device("cpu"))
    sums = x.float() @ weight.float().T
    for scale in (torch.tensor(0.3), torch.tensor(0.7)):  # as of a router
        assert not same_bits((sums * scale).bfloat16(), (sums.bfloat16() * scale).bfloat16())


def test_a_head_in_slabs_is_multiplied_without_decoding_to_the_bits_of_vllm(
    vllm_gemm: Gemm, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, vllm_gemm)
    for user in (head_op, head_proof):
        monkeypatch.setattr(user, "find_gemm", lambda name: vllm_gemm)
    monkeypatch.setattr(head_op, "known", {})
    monkeypatch.setattr(compat, "is_last_stage", lambda: True)
    scratch.release()  # what other tests needed might hold the whole head
    rows, slab = 256, 128
    config = DFloat11Config(Options(layout="fast", mode="fused-exact", slab=2 * slab * COLS))
    head = vllm_embedding.ParallelLMHead(rows, COLS, quant_config=config, prefix="lm_head")
    weight = to_torch(gaussian(rows, COLS))
    head.weight.weight_loader(head.weight, weight)
    head.quant_method.process_weights_after_loading(head)
    head.quant_method.process_weights_after_loading(head)  # as vLLM does after the last layer
    model = torch.nn.ModuleList([head])
    scheduler = SimpleNamespace(max_num_seqs=2, max_num_batched_tokens=2)
    proven_products.prepare(model, None)
    heads.prepare(model, SimpleNamespace(scheduler_config=scheduler), None)
    assert head.quant_method.slab == slab
    held, decoded = BY_NAME["fast"], []
    watched = replace(held, decode_run=lambda *of: decoded.append(of) or held.decode_run(*of))
    monkeypatch.setitem(cast(dict[str, Layout], BY_NAME), "fast", watched)
    for num_x in (1, 2):
        x = activations(num_x)
        assert same_bits(head.quant_method.apply(head, x), vllm_gemm(x, weight, None))
    assert not decoded


def test_products_that_are_not_equal_are_decoded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use(monkeypatch, CPU_GEMM)
    layer = layer_of(WEIGHT, BIAS)
    assert "equal to vLLM's GEMM for none of 1 shapes of matrices on this device" in caplog.text
    decoded = decoding(monkeypatch)
    assert same_bits(layer(activations(2))[0], CPU_GEMM(activations(2), WEIGHT, BIAS))
    assert decoded == [1]


def test_only_the_numbers_of_rows_that_are_equal_are_multiplied_so(
    vllm_gemm: Gemm, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Bug caught: a range up to the largest number of rows, where another in between takes another algorithm.
    def but_for_two(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if len(x) == 2:
            x, weight = x.flip(1), weight.flip(1)
        return vllm_gemm(x, weight, bias)

    use(monkeypatch, but_for_two)
    monkeypatch.setattr(product_proof, "STOPS_AT_FIRST", ())
    layer = layer_of(WEIGHT)
    assert list(in_order.known.values()) == [{1, 3}]
    decoded = decoding(monkeypatch)
    for num_x in (1, 2, 3):
        x = activations(num_x)
        assert same_bits(layer(x)[0], but_for_two(x, WEIGHT, None))
    assert decoded == [1]


def test_a_bias_is_added_where_older_vllm_adds_it(
    vllm_gemm: Gemm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def older(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y = vllm_gemm(x, weight, None)
        return y if bias is None else y + bias

    use(monkeypatch, older)
    monkeypatch.setattr(gemms, "adds_bias_to_rounded", lambda: True)
    layer = layer_of(WEIGHT, BIAS)
    decoded = decoding(monkeypatch)
    assert same_bits(layer(activations(3))[0], older(activations(3), WEIGHT, BIAS))
    assert not decoded


def test_a_proof_is_kept_for_the_same_kernels_and_no_others(
    vllm_gemm: Gemm, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, vllm_gemm)
    layer = layer_of(WEIGHT)
    compared: list[Any] = []
    monkeypatch.setattr(
        product_proof, "compare", lambda product, counts: compared.append(product) or {}
    )  # fmt: skip
    in_order.known.clear()
    proven_products.prepare(torch.nn.ModuleList([layer]), None)
    assert list(in_order.known.values()) == [{1, 2, 3}]
    assert not compared
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    in_order.known.clear()
    proven_products.prepare(torch.nn.ModuleList([layer]), None)
    assert list(in_order.known.values()) == [frozenset()]
    assert len(compared) == 1


def test_what_the_proof_did_not_see_is_decoded(
    vllm_gemm: Gemm, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Bug caught: the addend of an addmm, taken for a bias; activations that are not contiguous.
    use(monkeypatch, vllm_gemm)
    layer = layer_of(WEIGHT, BIAS)
    x, method = activations(2), layer.quant_method
    known = x, None, ROWS, COLS, "fast", in_order.BATCH_INVARIANT
    assert in_order.is_proven(*known)
    assert in_order.is_proven(x, BIAS, *known[2:])
    assert not in_order.is_proven(x, BIAS[:1], *known[2:])
    assert not in_order.is_proven(x, BIAS[:1].expand(ROWS), *known[2:])
    assert not in_order.is_proven(x.float(), *known[1:])
    assert not in_order.is_proven(x[0], *known[1:])
    assert not in_order.is_proven(x.T.contiguous().T, *known[1:])
    assert not in_order.is_proven(x, torch.zeros(2, ROWS), *known[2:])
    other = BIAS.float()  # as no layer has it
    assert not in_order.is_proven(x, other, *known[2:])
    assert not in_order.is_proven(*known[:-1], "auto")
    assert method.in_order_rows == MOST


def test_a_gemm_that_is_tuned_after_loading_is_not_compared(
    vllm_gemm: Gemm, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use(monkeypatch, vllm_gemm)
    assert gemms.is_tuned_later("flashinfer_cutedsl")
    assert not gemms.is_tuned_later("auto")
    monkeypatch.setattr(gemms, "is_tuned_later", lambda name: True)
    monkeypatch.setattr(product_proof, "compare", lambda *of: pytest.fail("compared"))
    layer_of(WEIGHT)
    assert "equal to vLLM's GEMM for none of 1 shapes" in caplog.text


def test_no_proof_is_kept_where_each_process_chooses_its_gemms(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda.tunable, "is_enabled", lambda: True)
    monkeypatch.setattr(proof_cache, "key_of", lambda product: pytest.fail("looked for"))
    on_gpu = in_order.InOrderProduct(torch.device("cuda"), ROWS, COLS, "fast", "auto")
    assert proof_cache.load(on_gpu) == (frozenset(), frozenset())
    proof_cache.save(on_gpu, {1}, {1})


@pytest.mark.parametrize("without_decoding", [(MOST, 0), (0, MOST)], ids=["fused", "in order"])
def test_activations_of_another_dtype_are_refused_as_by_vllm(
    without_decoding: tuple[int, int], vllm_gemm: Gemm, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Bug caught: FP32 activations, taken for pairs of BF16.
    use(monkeypatch, vllm_gemm)
    packed = packed_of(layer_of(WEIGHT))
    assert packed is not None
    use(monkeypatch, torch.nn.functional.linear)
    given = None, None, (ROWS, COLS, *without_decoding), in_order.BATCH_INVARIANT, "fast"
    linear_op.linear(activations(2), packed.desc, *given)
    with pytest.raises(RuntimeError, match="dtype"):
        linear_op.linear(activations(2).float(), packed.desc, *given)


def test_no_memory_for_a_comparison_proves_nothing(
    monkeypatch: pytest.MonkeyPatch, vllm_gemm: Gemm
) -> None:
    def full(*of: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    use(monkeypatch, vllm_gemm)
    monkeypatch.setattr(product_proof.cancelling, "operands", full)
    layer = layer_of(WEIGHT)
    assert list(in_order.known.values()) == [frozenset()]
    assert same_bits(layer(activations(1))[0], vllm_gemm(activations(1), WEIGHT, None))


def test_version_of_vllm_decides_where_the_bias_is_added() -> None:
    # The installed one adds it to the sum (vLLM 0.31 and later).
    assert not gemms.adds_bias_to_rounded()
