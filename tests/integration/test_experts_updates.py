"""New weights for compressed experts in a loaded model: whole layers, single experts, one tensor for all, biases."""

import shutil
from pathlib import Path
from typing import Any

import expert_layers
import pytest
import tiny_models
import torch
from expert_layers import DFLOAT11, FAST, INTERMEDIATE, NUM_EXPERTS, experts_of, values
from helpers import same_bits
from model_loads import loaded
from safetensors.torch import load_file

from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.integration.seam import expert_kernels, layerwise

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return expert_layers.save("whole tiles", tmp_path_factory.mktemp("experts") / "model")


@pytest.fixture(scope="module")
def bf16(source: Path) -> list[torch.Tensor]:
    """Return w13 and w2 of BF16 vLLM for the model with whole tiles."""
    with loaded(source) as model:
        return values(experts_of(model))


def test_new_experts_and_biases_take_effect_and_the_kernel_sees_later_writes_to_biases(
    tmp_path: Path,
) -> None:
    # Bug caught: after an update the kernel read biases that were no parameters of the layer any more.
    first, second = (
        tiny_models.gpt_oss(tmp_path / "first", 0),
        tiny_models.gpt_oss(tmp_path / "second", 1),
    )
    with loaded(second) as model:
        held = values(experts_of(model))
        biases = experts_of(model).w13_bias.detach().clone()
    new = {n: t for n, t in load_file(second / "model.safetensors").items() if ".experts." in n}
    with loaded(first, **DFLOAT11) as model:
        layer = experts_of(model)
        desc = layer.__dict__["dfloat11_desc_w13_weight"]
        for _ in range(2):
            model.load_weights(list(new.items()))
            assert all(same_bits(*pair) for pair in zip(values(layer), held, strict=True))
            assert torch.equal(layer.w13_bias, biases)
            kernel = layer.quant_method.moe_kernel.fused_experts
            assert kernel.w1_bias.data_ptr() == layer.w13_bias.data_ptr()
            assert kernel.w2_bias.data_ptr() == layer.w2_bias.data_ptr()
            assert layer.__dict__["dfloat11_desc_w13_weight"] is desc


def test_experts_under_lora_take_the_names_of_a_checkpoint(source: Path) -> None:
    # Bug caught: vLLM looks for the names in an adapter's file then, so new experts were lost without an error.
    new = {n: t.neg() for n, t in load_file(source / "model.safetensors").items() if "expert" in n}
    with loaded(source, **DFLOAT11) as model:
        layer = experts_of(model)
        expected = [tensor.neg() for tensor in values(layer)]
        layer.lora_base_layer_prefix = "base_layer."
        model.load_weights(list(new.items()))
        assert layer.lora_base_layer_prefix == "base_layer."
        assert all(same_bits(*pair) for pair in zip(values(layer), expected, strict=True))


@pytest.mark.parametrize("options", [DFLOAT11, FAST], ids=["packed", "fast"])
def test_one_expert_is_replaced_where_the_kernel_keeps_the_form_of_a_checkpoint(
    options: dict[str, Any], source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As with vLLM's Triton kernel on a GPU: the CPU kernel's own form is left out here.
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    monkeypatch.setattr(cpu_moe, "cpu_prepack_moe_weight", lambda weight, *_: weight)
    monkeypatch.setattr(expert_kernels, "keeps_form_of_experts", lambda _: True)
    prefix = "model.layers.0.mlp.experts.3."
    new = {n: t.neg() for n, t in load_file(source / "model.safetensors").items() if prefix in n}
    with loaded(source, **options) as model:
        layer = experts_of(model)
        expected = values(layer)
        model.load_weights([(f"{prefix}up_proj.weight", new[f"{prefix}up_proj.weight"])])
        expected[0][3, INTERMEDIATE["whole tiles"] :].neg_()
        assert all(same_bits(*pair) for pair in zip(values(layer), expected, strict=True))
        model.load_weights(list(new.items()))
        expected[0][3, : INTERMEDIATE["whole tiles"]].neg_()
        expected[1][3].neg_()
        assert all(same_bits(*pair) for pair in zip(values(layer), expected, strict=True))


def fused(source: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint, those of all experts of a layer stacked in two."""
    tensors = load_file(source / "model.safetensors")
    prefix = "model.layers.0.mlp.experts"

    def stacked(kind: str) -> torch.Tensor:
        return torch.stack([tensors.pop(f"{prefix}.{i}.{kind}.weight") for i in range(NUM_EXPERTS)])

    tensors[f"{prefix}.gate_up_proj"] = torch.cat([stacked("gate_proj"), stacked("up_proj")], 1)
    tensors[f"{prefix}.down_proj"] = stacked("down_proj")
    return tensors


def test_fused_tensors_of_a_checkpoint_are_loaded_as_single_ones(
    source: Path, bf16: list[torch.Tensor]
) -> None:
    with loaded(source, **DFLOAT11) as model:
        layer = experts_of(model)
        model.load_weights([(name, tensor.neg()) for name, tensor in fused(source).items()])
        held = [tensor.neg() for tensor in bf16]
        assert all(same_bits(*pair) for pair in zip(values(layer), held, strict=True))


@pytest.mark.parametrize(
    ("is_reload", "words"),
    [(True, r"w2_weight: 0 of .*expert 0 down_proj.*All weights are as before"),
     (False, r"^model\.layers\.0\.mlp\.experts.*\.w13_weight: only a part of it")],
)  # fmt: skip
def test_a_part_of_the_experts_given_twice_does_not_stand_for_the_rest(
    source: Path, bf16: list[torch.Tensor], is_reload: bool, words: str
) -> None:
    # Bug caught: gate and up in one tensor and each gate once more are as many elements as a whole layer, so down_proj
    # was served from uninitialised memory.
    gates = {n: t for n, t in load_file(source / "model.safetensors").items() if "gate_proj" in n}
    both = {n: t for n, t in fused(source).items() if "gate_up_proj" in n}
    with loaded(source, **DFLOAT11) as model:
        if is_reload:
            layerwise.begin(model)
        with pytest.raises(UnsupportedError, match=words):
            model.load_weights([*both.items(), *gates.items()])
        assert all(map(same_bits, values(experts_of(model)), bf16))


def test_checkpoint_with_experts_under_two_names_is_told_what_to_remove(
    source: Path, tmp_path: Path
) -> None:
    # Bug caught: the advice was to give new weights to an engine that did not run yet.
    model = shutil.copytree(source, tmp_path / "model")
    tiny_models.edit(model, lambda tensors: tensors.update(fused(source)))
    with pytest.raises(UnsupportedError, match="under two names"), loaded(model, **DFLOAT11):
        pass
