"""Single layers without an engine: slices of every rank, biases, the op, and the order of weights."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import same_bits
from model_loads import group_of_one
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers import vocab_parallel_embedding as vllm_embedding

from vllm_dfloat.checkpoint import flat_weight
from vllm_dfloat.checkpoint.lazy_weight import LazyWeight
from vllm_dfloat.device import unit_resident
from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.integration.config import DFloat11Config
from vllm_dfloat.integration.layers import layouts, linear_op, lookup, tying
from vllm_dfloat.integration.layers.method import packed_of
from vllm_dfloat.integration.layers.placeholder import WeightPlaceholder
from vllm_dfloat.integration.loading.stored_weights import biases_after_weights
from vllm_dfloat.integration.seam.options import LAYOUTS, Options

COLS = 256


@pytest.fixture(autouse=True)
def vllm_config() -> Iterator[None]:
    """Stand where vLLM builds a model: one rank, BF16, a current config."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with set_current_vllm_config(VllmConfig()), group_of_one():
        yield
    torch.set_default_dtype(before)


def config(layout: str) -> DFloat11Config:
    return DFloat11Config(Options(layout=layout))


def random_weight(*shape: int) -> torch.Tensor:
    return (
        torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
        .mul(0.02)
        .bfloat16()
    )


def pretend(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    """Make layers behave as on rank `rank` of `size`."""
    import vllm.model_executor.parameter as parameter

    for module in (vllm_linear, parameter, vllm_embedding):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)


def qkv(**common: Any) -> tuple[Any, list[tuple[str | int | None, int, int]]]:
    # Two KV heads: with four ranks each is on two of them.
    layer = vllm_linear.QKVParallelLinear(COLS, 64, 8, 2, bias=False, **common)
    return layer, [("q", 512, COLS), ("k", 128, COLS), ("v", 128, COLS)]


def gate_up(**common: Any) -> tuple[Any, list[tuple[str | int | None, int, int]]]:
    layer = vllm_linear.MergedColumnParallelLinear(COLS, [384, 384], bias=False, **common)
    return layer, [(0, 384, COLS), (1, 384, COLS)]


def column(**common: Any) -> tuple[Any, list[tuple[str | int | None, int, int]]]:
    return vllm_linear.ColumnParallelLinear(COLS, 384, bias=False, **common), [(None, 384, COLS)]


def row(**common: Any) -> tuple[Any, list[tuple[str | int | None, int, int]]]:
    layer = vllm_linear.RowParallelLinear(COLS, 384, bias=False, **common)
    return layer, [(None, 384, COLS)]


def replicated(**common: Any) -> tuple[Any, list[tuple[str | int | None, int, int]]]:
    return vllm_linear.ReplicatedLinear(COLS, 384, bias=False, **common), [(None, 384, COLS)]


def embedding(**common: Any) -> tuple[Any, list[tuple[str | int | None, int, int]]]:
    layer = vllm_embedding.VocabParallelEmbedding(500, COLS, **common)  # 512 with padding
    return layer, [(None, 500, COLS)]


def lm_head(**common: Any) -> tuple[Any, list[tuple[str | int | None, int, int]]]:
    return vllm_embedding.ParallelLMHead(500, COLS, **common), [(None, 500, COLS)]


def load(
    layer: torch.nn.Module,
    parts: list[tuple[str | int | None, int, int]],
    make: Any = random_weight,
) -> None:
    for shard, *shape in parts:
        arguments = (make(*shape),) if shard is None else (make(*shape), shard)
        layer.weight.weight_loader(layer.weight, *arguments)


def finish(layer: torch.nn.Module) -> None:
    """Process a layer that lacks only padding, which is never loaded, as vLLM does at the end of a checkpoint."""
    from vllm.model_executor.model_loader.reload import layerwise

    if packed_of(layer) is None:
        layerwise._layerwise_process(layer, layerwise.get_layerwise_info(layer))


KINDS = [qkv, gate_up, column, row, replicated, embedding, lm_head]


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2), (3, 4)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_of_every_kind_holds_the_bits_that_vllm_loads(
    layout: str, kind: Any, rank: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, rank, size)
    plain, parts = kind(quant_config=None, prefix="layer")
    load(plain, parts)
    packed, parts = kind(quant_config=config(layout), prefix="layer")
    load(packed, parts)
    finish(packed)
    assert same_bits(packed.quant_method.dequantize_weight(packed), plain.weight.data)
    assert isinstance(packed.weight, WeightPlaceholder)
    assert packed.weight.shape == plain.weight.shape
    held = packed_of(packed)
    assert isinstance(held, unit_resident.UnitWeight) == (layout == "dfloat11")
    assert packed.dfloat11_desc.shape == (4,)


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 2), (3, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_of_a_weight_that_is_decoded_where_it_is_copied_a_rank_decodes_its_slice(
    kind: Any, rank: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flat_weight, "PIECE_WEIGHTS", 10_000)
    pretend(monkeypatch, rank, size)
    ranges: list[int] = []

    def lazy(*shape: int) -> torch.Tensor:
        weight = random_weight(*shape).view(-1)

        def read(start: int, stop: int) -> torch.Tensor:
            ranges.append(stop - start)
            return weight[start:stop].clone()

        return LazyWeight(read, shape)

    plain, parts = kind(quant_config=None, prefix="layer")
    load(plain, parts)
    packed, parts = kind(quant_config=config("packed"), prefix="layer")
    load(packed, parts, lazy)
    finish(packed)
    assert same_bits(packed.quant_method.dequantize_weight(packed), plain.weight.data)
    assert max(ranges) <= 10_000
    # The columns of a row-parallel slice lie between other columns, which are decoded too.
    everything = sum(rows * cols for _, rows, cols in parts)
    assert sum(ranges) <= (everything if kind is row else plain.weight.numel())


def test_projection_that_arrives_twice_does_not_stand_in_for_another() -> None:
    # Bug caught: the number of elements was right, but v_proj was uninitialised memory.
    layer, (q, k, _) = qkv(quant_config=config("packed"), prefix="layer")
    with pytest.raises(UnsupportedError, match=r"layer.weight: 163840 of 196608 .*part 3 of 3"):
        load(layer, [q, k, k])


@pytest.mark.parametrize("method", ["eagle", "draft_model"])
def test_lm_head_that_only_the_target_of_a_draft_has_is_left_to_it(method: str) -> None:
    layer, _ = lm_head(quant_config=config("packed"), prefix="head")
    parallel = SimpleNamespace(pipeline_parallel_size=1)
    drafting = SimpleNamespace(
        speculative_config=SimpleNamespace(method=method), parallel_config=parallel
    )
    tying.prepare(torch.nn.ModuleList([layer]), drafting, SimpleNamespace(runner_type="draft"))
    if method == "draft_model":  # a whole model, which keeps its own embedding
        with pytest.raises(UnsupportedError, match=r"head\.weight: 0 of 128000 weights arrived"):
            finish(layer)
        return
    finish(layer)
    assert packed_of(layer) is None
    layer.quant_method.process_weights_after_loading(layer)  # vLLM calls once more at the end
    assert layer.weight.shape == (512, COLS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_rank_compares_its_own_slice_of_an_lm_head_with_that_of_the_embedding(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    last_row_differs = random_weight(500, COLS).clone()
    last_row_differs[-1] += 1
    found = []
    for rank in range(2):
        pretend(monkeypatch, rank, 2)
        model = torch.nn.ModuleList()
        for kind in (embedding, lm_head):
            model.append(kind(quant_config=config(layout), prefix="layer")[0])
        tying.prepare(model, None, SimpleNamespace(word_embeddings_untied_by_checkpoint=True))
        load(model[0], [(None, 500, COLS)])
        load(model[1], [(None, 500, COLS)], lambda *shape: last_row_differs)
        for layer in model:
            finish(layer)
        payloads = [packed_of(layer).payload for layer in model]
        found.append(payloads[0] is payloads[1])
        assert packed_of(model[0]).desc.data_ptr() != packed_of(model[1]).desc.data_ptr()
    assert found == [True, False]


@pytest.mark.parametrize("rows", [256, 3072])  # on CPUs with AMX, vLLM has a GEMM for each of these
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layer_computes_what_the_unquantized_layer_computes(
    layout: str, rows: int, with_bias: bool
) -> None:
    outputs = []
    for quant_config in (None, config(layout)):
        layer = vllm_linear.ColumnParallelLinear(
            COLS, rows, bias=with_bias, quant_config=quant_config, prefix="layer"
        )
        load(layer, [(None, rows, COLS)])
        if with_bias:
            layer.bias.weight_loader(layer.bias, random_weight(rows))
        layer.quant_method.process_weights_after_loading(layer)
        outputs.append([layer(random_weight(num_tokens, COLS))[0] for num_tokens in (1, 7, 64)])
    for plain, packed in zip(*outputs, strict=True):
        assert same_bits(packed, plain)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_embedding_decodes_the_rows_asked_for(layout: str) -> None:
    layer, parts = embedding(quant_config=config(layout), prefix="embed")
    load(layer, parts)
    finish(layer)
    ids = torch.tensor([[0, 499], [7, 7]])
    assert same_bits(layer(ids), random_weight(500, COLS)[ids])


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_linear_op_passes_opcheck(layout: str, with_bias: bool, followed_anywhere: None) -> None:
    packed = layouts.BY_NAME[layout].pack(random_weight(384, COLS), "w")
    bias = random_weight(384) if with_bias else None
    x, sizes = random_weight(5, COLS), [384, COLS, 0, 0]
    arguments = (x, packed.desc, bias, None, sizes, linear_op.PLAIN, layout)
    torch.library.opcheck(linear_op.op, arguments)


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_lookup_op_passes_opcheck(layout: str, raw: bool, followed_anywhere: None) -> None:
    rows, cols = (64, 3) if raw else (80, 102)
    packed = layouts.BY_NAME[layout].pack(random_weight(rows, cols), "w")
    assert packed.is_raw == (raw and layout != "fast")  # which holds raw tiles, but no raw matrix
    torch.library.opcheck(lookup.op, (packed.desc, torch.tensor([0, 5, 63]), rows, cols, layout))


def test_biases_come_after_the_weights_of_their_layers() -> None:
    order = ["a.bias", "a.weight", "b.weight", "b.bias", "c.bias", "norm.weight"]
    pairs = [(name, torch.empty(0)) for name in order]
    got = [name for name, _ in biases_after_weights(pairs)]
    assert got == ["a.weight", "a.bias", "b.weight", "b.bias", "norm.weight", "c.bias"]
