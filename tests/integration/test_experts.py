"""Compressed routed experts, layer by layer and without an engine: what is decoded, what arrives, what is refused."""

import dataclasses
import gc
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import expert_layers
import pytest
import tiny_models
import torch
from expert_layers import DFLOAT11, INTERMEDIATE, NUM_EXPERTS, TOP_K, experts_of, values
from helpers import same_bits
from live_tensors import bf16_copies
from model_loads import loaded
from safetensors.torch import load_file

from vllm_dfloat.device import experts as device_experts
from vllm_dfloat.device import ops
from vllm_dfloat.device.scratch import scratch
from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.integration.layers import experts_kernel, layouts
from vllm_dfloat.integration.layers.experts import W2, W13, DFloat11ExpertsMethod
from vllm_dfloat.integration.layers.method import weights_of
from vllm_dfloat.integration.loading import live_check, report
from vllm_dfloat.integration.seam import expert_kernels, layer_kinds
from vllm_dfloat.integration.seam.options import Options

pytestmark = pytest.mark.engine

POISON = float("nan")
Models = Callable[[str], Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("experts")

    def make(sizes: str) -> Path:
        path = root / sizes
        return path if path.exists() else expert_layers.save(sizes, path)

    return make


@pytest.fixture(autouse=True, scope="module")
def with_amx() -> None:
    """Let this process use the matrix units that some CPUs have; torch does so at its first product."""
    a = torch.ones(64, 64, dtype=torch.bfloat16)
    torch.cpu._init_amx()
    torch.mm(a, a)


def multiply(layer: Any, chosen: list[int]) -> torch.Tensor:
    """Return what a layer makes of some tokens whose router chooses among these experts, each of them at least once."""
    generator = torch.Generator().manual_seed(len(chosen))
    x = torch.randn(5, layer.hidden_size, generator=generator).bfloat16()
    logits = torch.full((5, NUM_EXPERTS), -50.0)
    logits[:, chosen] = torch.randn(5, len(chosen), generator=generator)
    logits[range(len(chosen)), chosen] += 9
    method = layer.quant_method
    if method.is_monolithic:
        return method.apply_monolithic(layer, x, logits.bfloat16()).clone()
    weights, ids = torch.softmax(logits, -1).topk(TOP_K)
    return method.apply(layer, x, weights, ids.int(), None, None).clone()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poison the scratch, and mark its status words, before every layer."""
    take = scratch.take

    def poison(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, status = take(*args)
        out.fill_(POISON)
        status.fill_(device_experts.STATUS_SKIPPED)
        return out, status

    monkeypatch.setattr(scratch, "take", poison)


@pytest.mark.parametrize("layout", ["packed", "fast"])
@pytest.mark.parametrize("sizes", INTERMEDIATE)
def test_only_experts_with_tokens_are_decoded_and_the_answer_is_that_of_bf16(
    sizes: str, layout: str, models: Models, poisoned: None
) -> None:
    choices = [[0, 1], [7, 3], [2, 5, 6], [0, 1, 4, 5, 7]]
    with loaded(models(sizes)) as model:
        layer = experts_of(model)
        expected, held = [multiply(layer, chosen) for chosen in choices], values(layer)
    options = dict(additional_config={"dfloat11": {"layout": layout}})
    with loaded(models(sizes), **DFLOAT11, **options) as model:
        layer = experts_of(model)
        assert layer.quant_method.layout == layout
        assert all(same_bits(*pair) for pair in zip(values(layer), held, strict=True))
        for chosen, answer in zip(choices, expected, strict=True):
            assert same_bits(multiply(layer, chosen), answer)
            if not layer.quant_method.decodes_all:
                check_scratch(held, set(chosen), sizes, layout)


def check_scratch(held: list[torch.Tensor], chosen: set[int], sizes: str, layout: str) -> None:
    """Check that chosen experts lie decoded in the scratch, and that others are poison but for tiles they share."""
    out, status = scratch._buffers[torch.device("cpu"), 0]
    for weight in held:
        num_experts, rows, cols = weight.shape
        padded = layouts.BY_NAME[layout].scratch_numel(num_experts * rows, cols)
        found = out[: weight.numel()].view(weight.shape)
        is_written = status[: padded // 2048] != device_experts.STATUS_SKIPPED
        tiles = int(is_written.sum())
        assert all(same_bits(found[expert], weight[expert]) for expert in chosen)
        if layout == "fast":  # an expert's rows are those of a whole number of its tiles
            assert tiles == len(chosen) * rows // 64 * -(-cols // 128)
            assert all(found[e].isnan().all() for e in set(range(num_experts)) - chosen)
        elif sizes == "whole tiles":
            assert tiles == len(chosen) * rows * cols // 2048
            assert all(found[e].isnan().all() for e in set(range(num_experts)) - chosen)
        else:
            assert tiles <= len(chosen) * (rows * cols // 2048 + 1)
        out, status = out[padded:], status[padded // 2048 :]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.on_demand), 1])
def test_a_rank_of_expert_parallelism_holds_and_decodes_its_own_experts(
    rank: int, models: Models, monkeypatch: pytest.MonkeyPatch, poisoned: None
) -> None:
    # Bug caught: vLLM offers a rank the experts of others after its own layer is complete.
    from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig

    make = FusedMoEParallelConfig.make
    faked = dict(ep_size=2, ep_rank=rank, use_ep=True)
    monkeypatch.setattr(
        FusedMoEParallelConfig, "make", lambda *a, **k: dataclasses.replace(make(*a, **k), **faked)
    )
    with loaded(models("whole tiles")) as model:
        held = values(experts_of(model))
    with loaded(models("whole tiles"), **DFLOAT11) as model:
        layer = experts_of(model)
        assert layer_kinds.local_experts(layer) == list(range(4 * rank, 4 * rank + 4))
        assert all(same_bits(*pair) for pair in zip(values(layer), held, strict=True))
        if layer.quant_method.decodes_all:
            return  # vLLM 0.28
        kernel = layer.quant_method.moe_kernel.fused_experts
        ids = torch.tensor([[0, 5], [2, -1], [5, 0]], dtype=torch.int32)
        found = kernel.dfloat11.decoded(ids, layer.expert_map)
        for decoded, weight in zip(found, held, strict=True):
            for local in range(4):
                if local in ([0, 2], [1])[rank]:
                    assert same_bits(decoded[local], weight[local])
                else:
                    assert decoded[local].isnan().all()


def test_experts_that_would_not_shrink_are_named_and_served_as_they_are(
    models: Models, tmp_path: Path, log_lines: list[str], poisoned: None
) -> None:
    path = expert_layers.save("whole tiles", tmp_path / "m")

    def noise(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "experts" in name and "down" in name:  # every exponent as often as any other
                bits = torch.randint(-(1 << 15), 1 << 15, tensor.shape, dtype=torch.int16)
                tensors[name] = bits.view(torch.bfloat16)

    tiny_models.edit(path, noise)
    with loaded(path) as model:
        held = values(experts_of(model))
    with loaded(path, **DFLOAT11) as model:
        assert all(same_bits(*p) for p in zip(values(experts_of(model)), held, strict=True))
        assert weights_of(experts_of(model))[W2].is_raw
    line = next(line for line in log_lines if "held as BF16, would not shrink: " in line)
    assert "model.layers.0.mlp.experts.w2_weight" in line


@pytest.mark.parametrize("entry", ["model.layers.0.mlp.experts", "re:.*experts"])
def test_ignored_experts_stay_bf16(entry: str, models: Models, log_lines: list[str]) -> None:
    options = dict(additional_config={"dfloat11": {"ignore": [entry]}})
    with loaded(models("whole tiles"), **DFLOAT11, **options) as model:
        layer = experts_of(model)
        assert not weights_of(layer)
        assert not isinstance(layer.quant_method, DFloat11ExpertsMethod)
        assert report.summarize(model).num_experts == 0
    assert not [line for line in log_lines if "matches no layer" in line]


def test_summary_counts_experts_and_the_scratch(models: Models, log_lines: list[str]) -> None:
    scratch.release()
    with loaded(models("whole tiles"), **DFLOAT11) as model:
        summary, layer = report.summarize(model), experts_of(model)
        held = weights_of(layer)
        assert summary.num_compressed == summary.num_layers - 1  # the router
        assert summary.experts_bf16_bytes == 2 * sum(w.rows * w.cols for w in held.values())
        assert summary.experts_bytes == sum(w.num_bytes for w in held.values())
        with torch._C.DisableTorchFunctionSubclass():  # placeholders tell nobody of their storage
            sizes = [layer._parameters[name].untyped_storage().nbytes() for name in held]
        assert sizes == [2, 2]  # one NaN each
        needed = sum(ops.padded_numel(w.rows, w.cols) for w in held.values())
        assert 2 * needed < summary.scratch_bytes < 2.02 * needed + 2 * 2048 + 8
        assert not [name for name in summary.uncompressed if "w13" in name or "w2" in name]
    size = r"[0-9.]+ GiB"
    words = re.compile(f"; of these the experts of 1 layer {size} -> {size}; scratch {size}; not ")
    assert len([line for line in log_lines if words.search(line)]) == 1


def test_no_bf16_copy_of_an_expert_survives_loading(tmp_path: Path) -> None:
    # A model with its own weights: earlier models of this process may have left theirs in memory.
    path = expert_layers.save("whole tiles", tmp_path, seed=12)
    prints = {
        name: tensor[5, :32].view(torch.uint8).numpy().tobytes()
        for name, tensor in load_file(path / "model.safetensors").items()
        if ".experts." in name
    }
    with loaded(path) as model:  # and in the form of the kernel
        for i, tensor in enumerate(values(experts_of(model))):
            prints[f"tensor {i}"] = tensor[1, 7, :32].view(torch.uint8).numpy().tobytes()
        assert "tensor 0" in bf16_copies(prints)  # the scan finds a real copy
        del tensor
    del model
    gc.collect()
    with loaded(path, **DFLOAT11):
        assert bf16_copies(prints) == []


def test_experts_moved_while_serving_are_refused_in_one_sentence(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loaded(models("whole tiles"), **DFLOAT11) as model:
        method = experts_of(model).quant_method
        parallel = dataclasses.replace(method.moe.moe_parallel_config, enable_eplb=True)
        moving = dataclasses.replace(method.moe, moe_parallel_config=parallel)
        with pytest.raises(UnsupportedError, match=r"^experts: --enable-eplb moves .* `ignore`"):
            DFloat11ExpertsMethod(moving, "experts", Options())
        assert not method.supports_eplb
        # Bug caught: refused too where vLLM's kernel is one whose experts stay BF16, and can be moved.
        monkeypatch.setattr(expert_kernels, "_COMPRESSIBLE", ())
        assert not DFloat11ExpertsMethod(moving, "experts", Options()).can_compress


def test_writes_to_a_tensor_of_experts_are_refused(models: Models) -> None:
    with loaded(models("whole tiles"), **DFLOAT11) as model:
        layer = experts_of(model)
        assert layer.w13_weight.shape == values(layer)[0].shape
        sentence = r"^model.layers.0.mlp.experts.w13_weight: .* held compressed; nothing was read or changed"
        writes: list[Callable[[], Any]] = [
            lambda: layer.w13_weight.data.mul_(2),
            lambda: layer.w13_weight.data[0].zero_(),
            lambda: layer.w13_weight.copy_(values(layer)[0]),
            lambda: layer.w13_weight.weight_loader(layer.w13_weight, torch.ones(64, 64), "w13_weight", "w1", 0),
            lambda: setattr(layer, "w13_weight", torch.nn.Parameter(values(layer)[0])),
            lambda: layer.load_state_dict({}, strict=True),
        ]  # fmt: skip
        for write in writes:
            with pytest.raises(UnsupportedError, match=sentence):
                write()
        layer._parameters[W13] = torch.nn.Parameter(values(layer)[0])
        with pytest.raises(UnsupportedError, match="was replaced from outside"):
            multiply(layer, [0, 1])


def test_damage_of_experts_is_found_and_named(models: Models) -> None:
    with loaded(models("whole tiles"), **DFLOAT11) as model:
        layer = experts_of(model)
        worker = SimpleNamespace(rank=0, get_model=lambda: model, model_runner=SimpleNamespace())
        before = live_check.check_worker(worker)
        assert before["damaged"] == []
        assert before["tensors"] == sum(len(weights_of(each)) for each in model.modules())
        payload = weights_of(layer)[W2].payload
        payload[payload.numel() // 2] ^= 4
        (sentence,) = live_check.check_worker(worker)["damaged"]
        assert sentence.startswith("model.layers.0.mlp.experts.w2_weight: ")
        with pytest.raises(Exception, match=r"^model.layers.0.mlp.experts.w2_weight: "):
            layer.quant_method.dequantize_weight(layer)
        multiply(layer, [0, 1, 5])  # stays within its memory, whatever the bytes say
        layer.__dict__["dfloat11_desc_w2_weight"][0] += 16
        with pytest.raises(Exception, match=r"^model.layers.0.mlp.experts.w2_weight: "):
            multiply(layer, [0, 1])


def test_in_the_official_layout_all_experts_are_decoded_with_a_line(
    models: Models, log_lines: list[str]
) -> None:
    with loaded(models("whole tiles")) as model:
        layer = experts_of(model)
        answer, held = multiply(layer, [1, 4]), values(layer)
    options = dict(additional_config={"dfloat11": {"layout": "dfloat11"}})
    with loaded(models("whole tiles"), **DFLOAT11, **options) as model:
        layer = experts_of(model)
        assert all(same_bits(*pair) for pair in zip(values(layer), held, strict=True))
        assert same_bits(multiply(layer, [1, 4]), answer)
    line = "dfloat11: all experts of a layer are decoded, also those without tokens"
    assert len([each for each in log_lines if each.startswith(line)]) == 1


def spread(shape: torch.Size) -> torch.Tensor:
    """Return small weights of 50 exponents, which the fast layout cannot shrink and the packed one can."""
    generator = torch.Generator().manual_seed(1)
    exponents = torch.randint(-60, -9, shape, generator=generator)
    return (torch.randn(shape, generator=generator).sign() * 2.0**exponents).bfloat16()


@pytest.mark.parametrize("name", ["gate_proj", "down_proj"])
def test_both_tensors_of_a_layer_are_packed_if_one_would_not_shrink_in_the_fast_layout(
    name: str, tmp_path: Path, log_lines: list[str]
) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.endswith(f"{name}.weight") and "experts" in key]:
            tensors[key] = spread(tensors[key].shape)

    source = expert_layers.save("whole tiles", tmp_path / "m")
    tiny_models.edit(source, widen)
    with loaded(source) as model:
        layer = experts_of(model)
        answer, held = multiply(layer, [1, 4]), values(layer)
    options = dict(additional_config={"dfloat11": {"layout": "fast"}})
    with loaded(source, **DFLOAT11, **options) as model:
        layer = experts_of(model)
        assert layer.quant_method.layout == "packed"
        assert {type(weight) for weight in weights_of(layer).values()} == {ops.PackedWeight}
        assert all(same_bits(*pair) for pair in zip(values(layer), held, strict=True))
        assert same_bits(multiply(layer, [1, 4]), answer)
    told = "held in the packed layout, since in the fast one they would take 14 bits per weight or more: "
    assert f"dfloat11: {told}model.layers.0.mlp.experts" in log_lines


@pytest.mark.parametrize("decodes_all", [False, True])
@pytest.mark.parametrize("layout", ["packed", "fast"])
def test_experts_op_passes_opcheck(layout: str, decodes_all: bool, followed_anywhere: None) -> None:
    weight = torch.randn(4, 32, 64).mul(0.02).bfloat16()
    packed = layouts.BY_NAME[layout].pack(weight.view(128, 64), "w")
    ids = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    arguments = (packed.desc, ids, None, [4, 32, 64], layout, decodes_all)
    torch.library.opcheck(experts_kernel.op, arguments)
    assert same_bits(experts_kernel.op(*arguments), weight)
