"""Inductor's passes for a GPU on compressed layers, checked on a CPU; and the log line about other differences."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from vllm.config import CompilationConfig, VllmConfig
from vllm.platforms import current_platform

from vllm_dfloat.integration.compiling import additions, settings
from vllm_dfloat.integration.layers import linear_op

aten = torch.ops.aten
Linear = Callable[[torch.Tensor], torch.Tensor]
Model = Callable[[Linear, torch.Tensor, torch.Tensor], Any]
NUM_TOKENS, COLS, ROWS = 16, 64, 32
SIZES = [ROWS, COLS, 0, 0]
SIZES_IN_BLOCK = [*SIZES, *linear_op.Place(3, 5, 2, 3, 2), 8, 64, ROWS, COLS]


def norm(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.layer_norm(x, (ROWS,))


def residual_stream(linear: Linear, x: torch.Tensor, residual: torch.Tensor) -> Any:
    total = linear(x) + residual
    return norm(total), total


def residual_first(linear: Linear, x: torch.Tensor, residual: torch.Tensor) -> Any:
    return residual + linear(x)


def row_added(linear: Linear, x: torch.Tensor, residual: torch.Tensor) -> Any:
    return linear(x) + residual.select(0, 0)


def only_pointwise_after(linear: Linear, x: torch.Tensor, residual: torch.Tensor) -> Any:
    return norm(linear(x) + residual)


def used_twice(linear: Linear, x: torch.Tensor, residual: torch.Tensor) -> Any:
    product = linear(x)
    return product + residual, product


def added_in_float32(linear: Linear, x: torch.Tensor, residual: torch.Tensor) -> Any:
    return linear(x).float() + residual.float()


def two_products(linear: Linear, x: torch.Tensor, residual: torch.Tensor) -> Any:
    return linear(x) + linear(x + 1)


def nodes_after_inductor(
    model: Model, linear: Linear, mode: FakeTensorMode, device: str
) -> list[torch.fx.Node]:
    """Return the calls in a model's graph after Inductor's passes for a GPU; nothing is compiled."""
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.post_grad import post_grad_passes

    kept = (aten.mm.default, aten.addmm.default)  # as Inductor's own decompositions decide on a GPU
    table = {op: how for op, how in select_decomp_table().items() if op not in kept}
    x = torch.empty(NUM_TOKENS, COLS, dtype=torch.bfloat16, device=device)
    residual = torch.empty(NUM_TOKENS, ROWS, dtype=torch.bfloat16, device=device)
    graph = make_fx(lambda a, b: model(linear, a, b), decomposition_table=table)(x, residual)
    with V.set_fake_mode(mode):
        post_grad_passes(graph, True)
    return [node for node in graph.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    ("model", "num_taken_in"),
    [
        (residual_stream, 1),
        (residual_first, 1),
        (row_added, 1),
        (two_products, 1),
        (only_pointwise_after, 0),
        (used_twice, 0),
        (added_in_float32, 0),
    ],
)
@pytest.mark.parametrize("in_group", [False, True])
def test_inductor_takes_additions_into_compressed_layers_where_it_does_so_in_bf16(
    model: Model, num_taken_in: int, in_group: bool
) -> None:
    # Bug caught: a compressed layer rounded product and sum; BF16 vLLM rounds once, in the GEMM.
    additions.install()
    mode = FakeTensorMode()
    with mode:
        weight = torch.empty(ROWS, COLS, dtype=torch.bfloat16, device="cuda")
        desc = torch.empty(8, dtype=torch.int64, device="cuda")
        group = desc if in_group else None

        def plain(x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, weight)

        def compressed(x: torch.Tensor) -> torch.Tensor:
            sizes = SIZES_IN_BLOCK if in_group else SIZES
            return linear_op.op(x, desc, None, group, sizes, linear_op.PLAIN, "packed")

        expected = nodes_after_inductor(model, plain, mode, "cuda")
        nodes = nodes_after_inductor(model, compressed, mode, "cuda")
    taken_in = [node for node in nodes if node.target is linear_op.op and node.args[2] is not None]
    assert len(taken_in) == num_taken_in
    assert len([node for node in expected if node.target is aten.addmm.default]) == num_taken_in
    for node in taken_in:
        assert node.args[4:] == (SIZES_IN_BLOCK if in_group else SIZES, linear_op.PLAIN, "packed")
        assert (node.args[3] is not None) == in_group
        assert node.meta["val"].shape == (NUM_TOKENS, ROWS)
    added = [node for node in nodes if node.target is aten.add.Tensor]
    assert len(added) == len([node for node in expected if node.target is aten.add.Tensor])


@pytest.mark.parametrize("name", [linear_op.BATCH_INVARIANT, "auto"])
def test_inductor_leaves_additions_where_bf16_has_another_gemm(name: str) -> None:
    """`auto` is vLLM's own op on this platform; on a GPU it is F.linear."""
    additions.install()
    mode = FakeTensorMode()
    with mode:
        desc = torch.empty(8, dtype=torch.int64, device="cuda")

        def compressed(x: torch.Tensor) -> torch.Tensor:
            return linear_op.op(x, desc, None, None, SIZES, name, "packed")

        nodes = nodes_after_inductor(residual_first, compressed, mode, "cuda")
    assert [node.target for node in nodes] == [linear_op.op, aten.add.Tensor]


def test_an_addend_for_a_bias_is_added_once_and_rounded_once() -> None:
    """The op takes a matrix as its bias, and then equals addmm."""
    torch.manual_seed(0)
    x = torch.randn(NUM_TOKENS, COLS, dtype=torch.bfloat16)
    weight = torch.randn(ROWS, COLS, dtype=torch.bfloat16)
    addend = torch.randn(NUM_TOKENS, ROWS, dtype=torch.bfloat16)
    result = linear_op.find_gemm(linear_op.PLAIN)(x, weight, addend)
    assert torch.equal(result, torch.addmm(addend, x, weight.t()))


def test_an_inductor_with_another_inside_costs_one_line(
    monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    from torch._inductor.fx_passes import post_grad

    monkeypatch.delattr(post_grad, "pass_patterns")
    additions.install.__wrapped__()
    (line,) = log_lines
    assert "no addition can be taken into compressed layers" in line
    assert "pass_patterns" in line


QUIET = {"deterministic": True, "combo_kernels": False}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"inductor_compile_config": QUIET}, []),
        ({"inductor_compile_config": {}}, ["by timing them"]),
        (
            {
                "inductor_compile_config": {
                    "deterministic": True,
                    "combo_kernels": True,
                    "benchmark_combo_kernel": True,
                }
            },
            ["by timing them"],
        ),
        ({"inductor_compile_config": QUIET | {"max_autotune": True}}, ["max_autotune: other"]),
        ({"inductor_compile_config": QUIET, "compile_sizes": [1, 8]}, ["compile_sizes: other"]),
        (
            {"inductor_compile_config": QUIET | {"keep_addmm_fused_for_half_dtypes": False}},
            ["takes biases out"],
        ),
        (
            {"inductor_compile_config": {"max_autotune_gemm": True}},
            ["by timing them", "max_autotune_gemm: other"],
        ),
    ],
)
def test_each_setting_that_parts_compiled_answers_is_named(
    given: dict[str, Any], words: list[str]
) -> None:
    found = settings.differences(CompilationConfig(**given))
    assert len(found) == len(words)
    assert all(word in line for word, line in zip(words, found, strict=True))


def test_gemms_fused_with_communication_are_named() -> None:
    config = CompilationConfig(inductor_compile_config=QUIET)
    config.pass_config = SimpleNamespace(fuse_gemm_comms=True)  # vLLM 0.28 to 0.30 have it
    (line,) = settings.differences(config)
    assert line.startswith("fuse_gemm_comms")


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(current_platform), "is_cuda_alike", lambda self: True)


def run(**given: Any) -> VllmConfig:
    config = VllmConfig()
    config.compilation_config = CompilationConfig(**given)
    return config


def test_a_run_compiled_for_a_gpu_gets_one_line(on_a_gpu: None, log_lines: list[str]) -> None:
    settings.prepare(run(mode=3, backend="inductor"))
    (line,) = log_lines
    assert settings.ADVICE in line
    assert "docs/exactness.md" in line


@pytest.mark.parametrize(
    "given",
    [
        dict(mode=0),
        dict(mode=2, backend="eager"),
        dict(mode=3, backend="inductor", inductor_compile_config=QUIET),
    ],
)
def test_a_run_that_times_nothing_gets_none(
    given: dict[str, Any], on_a_gpu: None, log_lines: list[str]
) -> None:
    settings.prepare(run(**given))
    assert not log_lines


def test_a_run_on_a_cpu_gets_none(log_lines: list[str]) -> None:
    settings.prepare(run(mode=2, backend="inductor"))
    assert not log_lines


def test_the_advice_is_understood_by_vllm_and_leaves_nothing_to_say() -> None:
    import json
    import shlex

    option, value = shlex.split(settings.ADVICE)
    assert option == "--compilation-config"
    assert not settings.differences(CompilationConfig(**json.loads(value)))
