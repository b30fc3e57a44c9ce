"""A checkpoint that lacks any weight is refused in a sentence that names it, also if vLLM's own check skips it.

vLLM's loaders load the models into real layers; a refusal needs no engine.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nemotron_parse
import pytest
import tiny_models
import torch
import vllm
from model_loads import loaded
from safetensors.torch import load_file, save_file

from vllm_dfloat.convert.compress import compress
from vllm_dfloat.convert.source import open_source
from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.integration.layers.placeholder import decoded_by_detach
from vllm_dfloat.integration.loading import report

pytestmark = pytest.mark.engine

SMALL = dict(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_attention_heads=2, head_dim=32
)
DFLOAT11 = dict(quantization="dfloat11")
Models = Callable[[str], Path]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Return a function: name of an architecture -> a folder with a small checkpoint of it."""
    root = tmp_path_factory.mktemp("small")

    def make(name: str) -> Path:
        experts = dict(moe_intermediate_size=64) if name == "qwen3_moe" else {}
        # vLLM 0.28 accepts only such a Phi.
        phi = dict(intermediate_size=4 * 64, num_key_value_heads=2) if name == "phi" else {}
        heads = dict(num_key_value_heads=1)
        return (
            root / name
            if (root / name).exists()
            else tiny_models.save(name, root / name, **{**SMALL, **heads, **experts, **phi})
        )

    return make


def without(source: Path, path: Path, *names: str) -> Path:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in names:
            del tensors[name]

    return tiny_models.edit(shutil.copytree(source, path), drop)


ATTENTION, MLP = "model.layers.1.self_attn", "model.layers.1.mlp"
BY_BF16_VLLM = [  # missing tensors that BF16 vLLM refuses too: architecture, tensor
    ("llama", "model.layers.1.input_layernorm.weight"),
    ("llama", "model.norm.weight"),
    ("qwen3", f"{ATTENTION}.q_norm.weight"),
    ("qwen3", "model.norm.weight"),  # tied
    ("phi", "model.final_layernorm.bias"),
]
BY_US = [  # missing tensors without which it would serve: architecture, tensor, words of our error
    ("llama", f"{ATTENTION}.k_proj.weight", "qkv_proj.weight: 6144 of 8192 weights arrived (missing: k_proj)"),
    ("llama", f"{MLP}.up_proj.weight", "gate_up_proj.weight: 4096 of 8192 weights arrived (missing: up_proj)"),
    ("llama", f"{ATTENTION}.o_proj.weight", "o_proj.weight: 0 of 4096 weights arrived"),
    ("llama", "model.embed_tokens.weight", "model.embed_tokens.weight: 0 of 4096 weights arrived"),
    ("llama", "lm_head.weight", "lm_head.weight: 0 of 4096 weights arrived"),
    ("qwen3", "model.embed_tokens.weight", "model.embed_tokens.weight: 0 of 4096 weights arrived"),  # tied
    ("qwen2", f"{ATTENTION}.v_proj.bias", "qkv_proj.bias: 96 of 128 weights arrived (missing: v_proj)"),
    ("phi", f"{MLP}.fc2.bias", "mlp.fc2.bias: 0 of 64 weights arrived"),
    ("qwen3_moe", f"{MLP}.experts.0.gate_proj.weight", "(missing: expert 0 gate_proj)"),
    ("qwen3_moe", f"{MLP}.experts.2.up_proj.weight", "(missing: expert 2 up_proj)"),
    ("qwen3_moe", f"{MLP}.experts.3.down_proj.weight", "(missing: expert 3 down_proj)"),
    ("qwen3_moe", f"{MLP}.gate.weight", "mlp.gate.weight: 0 of 256 weights arrived"),
]  # fmt: skip
MISSING = [
    *((*case, f"not initialized from checkpoint: {{'{case[1]}'}}") for case in BY_BF16_VLLM),
    *BY_US,
]
OFFICIAL = [
    MISSING[0],
    *(
        case
        for case in BY_US
        if re.search(r"k_proj|v_proj\.bias|experts\.2|gate\.w|lm_head", case[1])
    ),
]


@pytest.mark.parametrize(
    ("architecture", "name", "message", "is_official"),
    [*((*case, False) for case in MISSING), *((*case, True) for case in OFFICIAL)],
)
def test_checkpoint_that_lacks_a_tensor_is_refused_in_a_sentence_that_names_it(
    architecture: str, name: str, message: str, is_official: bool, small: Models, tmp_path: Path
) -> None:
    # Bug caught: wrong tokens without an error, with uninitialised memory as the weight.
    model = without(small(architecture), tmp_path / "model", name)
    if is_official:
        compress(open_source(model), tmp_path / "official", workers=1)
        model = tmp_path / "official"
    with pytest.raises(UnsupportedError) as raised, loaded(model, **DFLOAT11):
        pass
    said = str(raised.value)
    assert said.startswith(f"{model}: ")
    assert message in said
    assert said.endswith("the checkpoint is incomplete or belongs to another model. Get it whole.")


@pytest.mark.parametrize(("architecture", "name"), BY_BF16_VLLM)
def test_bf16_vllm_refuses_the_same(
    architecture: str, name: str, small: Models, tmp_path: Path
) -> None:
    model = without(small(architecture), tmp_path / "model", name)
    with pytest.raises(ValueError, match=f"not initialized .*{name}"), loaded(model):
        pass


def test_no_tensor_of_a_checkpoint_can_be_missing(small: Models, tmp_path: Path) -> None:
    model = small("qwen3_moe")
    for i, name in enumerate(load_file(model / "model.safetensors")):
        lacking = without(model, tmp_path / str(i), name)
        with (
            pytest.raises(UnsupportedError, match="the checkpoint is incomplete"),
            loaded(lacking, **DFLOAT11),
        ):
            pytest.fail(f"served without {name}")


def cut(source: Path, path: Path, name: str, dim: int) -> Path:
    """Write a copy of a checkpoint with half of one tensor."""

    def halve(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].chunk(2, dim)[0].contiguous()

    return tiny_models.edit(shutil.copytree(source, path), halve)


def pad_experts(monkeypatch: pytest.MonkeyPatch, hidden: int, inner: int) -> None:
    """Make vLLM pad experts, as it does for some GPU kernels."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
        UnquantizedFusedMoEMethod,
    )

    monkeypatch.setattr(
        UnquantizedFusedMoEMethod,
        "maybe_roundup_sizes",
        lambda _, hidden_size, inner_size, *__: (hidden_size + hidden, inner_size + inner),
    )


@pytest.mark.parametrize(("hidden", "inner"), [(0, 0), (32, 0), (0, 32), (32, 96)])
@pytest.mark.parametrize(
    ("kind", "dim", "missing"),
    [("gate_proj", 0, "w13_weight"), ("up_proj", 0, "w13_weight"), ("down_proj", 1, "w2_weight")],
)
def test_expert_that_is_cut_off_is_refused_whatever_vllm_pads(
    kind: str,
    dim: int,
    missing: str,
    hidden: int,
    inner: int,
    small: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Bug caught: one element of an expert was enough, since padding never arrives; the rest was uninitialised memory.
    pad_experts(monkeypatch, hidden, inner)
    model = cut(small("qwen3_moe"), tmp_path / "model", f"{MLP}.experts.1.{kind}.weight", dim)
    with (
        pytest.raises(UnsupportedError, match=rf"{missing}: .* \(missing: expert 1( {kind})?\)"),
        loaded(model, **DFLOAT11),
    ):
        pass


EXPERT, OUTPUT = f"{MLP}.experts.1.up_proj.weight", f"{ATTENTION}.o_proj.weight"


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (EXPERT, lambda t: torch.cat([t, t]), r"w3 of expert 1: a tensor \[128, 64\] does not fit"),
        (  # before 0.32 vLLM passes it over
            EXPERT,
            lambda t: t[None],
            r"a tensor \[1, 64, 64\] does not fit into \[4, 128, 64\]|\(missing: expert 1 up_proj\)",
        ),
        (EXPERT, lambda t: t[0, 0], r"a tensor \[\] does not fit"),
        (OUTPUT, lambda t: torch.cat([t, t]), r"o_proj: a tensor \[128, 64\] does not fit"),
    ],
)
def test_tensor_that_does_not_fit_is_told_with_its_shape_and_its_place(
    name: str, change: Callable[[Any], Any], words: str, small: Models, tmp_path: Path
) -> None:
    # Bug caught: an AssertionError without a word.
    model = shutil.copytree(small("qwen3_moe"), tmp_path / "model")
    tiny_models.edit(model, lambda tensors: tensors.update({name: change(tensors[name]).clone()}))
    with pytest.raises(UnsupportedError, match=words), loaded(model, **DFLOAT11):
        pass


@pytest.mark.parametrize(("hidden", "inner"), [(32, 0), (0, 32), (32, 96)])
def test_padding_of_experts_is_not_missed(
    hidden: int, inner: int, small: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    pad_experts(monkeypatch, hidden, inner)
    with loaded(small("qwen3_moe"), **DFLOAT11):
        pass


@pytest.mark.parametrize("name", ["o_proj", "gate_up_proj", "lm_head", "embed_tokens"])
def test_layer_that_is_left_in_bf16_must_be_there_too(
    name: str, small: Models, tmp_path: Path
) -> None:
    # Bug caught: NaN for every token.
    stored = name.replace("gate_up", "gate")
    whole = small("llama")
    names = [key for key in load_file(whole / "model.safetensors") if f"{stored}.weight" in key]
    model = without(whole, tmp_path / "model", names[-1])
    ignore = dict(additional_config={"dfloat11": {"ignore": [f"re:.*{name}"]}})
    with (
        pytest.raises(UnsupportedError, match=f"{name}.weight: .* weights arrived"),
        loaded(model, **DFLOAT11, **ignore),
    ):
        pass


def test_tensor_stored_twice_does_not_stand_in_for_a_missing_one(
    small: Models, tmp_path: Path
) -> None:
    # Bug caught: the number of elements was right, but one projection was uninitialised memory.
    model = without(small("llama"), tmp_path / "model", f"{ATTENTION}.v_proj.weight")
    key = f"{ATTENTION}.k_proj.weight"
    again = {key: load_file(model / "model.safetensors")[key]}
    save_file(again, model / "model-2.safetensors", {"format": "pt"})
    with (
        pytest.raises(UnsupportedError, match=r"6144 of 8192 weights arrived \(missing: v_proj\)"),
        loaded(model, **DFLOAT11),
    ):
        pass


def test_load_format_makes_no_difference(small: Models, tmp_path: Path) -> None:
    model = without(small("llama"), tmp_path / "model", "model.norm.weight")
    with (
        pytest.raises(UnsupportedError, match="not initialized from checkpoint"),
        loaded(model, **DFLOAT11, load_format="safetensors"),
    ):
        pass


def test_check_can_be_turned_off_as_in_vllm(small: Models, tmp_path: Path) -> None:
    model = without(small("llama"), tmp_path / "model", "model.norm.weight")
    off = dict(model_loader_extra_config={"enable_weights_track": False})
    with loaded(model, **DFLOAT11, **off):
        pass


@pytest.mark.parametrize("architecture", [*tiny_models.ARCHITECTURES, "phi"])
def test_whole_checkpoint_is_not_refused(architecture: str, small: Models) -> None:
    with loaded(small(architecture), **DFLOAT11):
        pass


def test_rows_that_only_fill_up_the_vocabulary_are_not_missed(tmp_path: Path) -> None:
    model = tiny_models.save("llama", tmp_path, **{**SMALL, "vocab_size": 70})
    for ignore in ([], ["lm_head"]):
        with loaded(model, **DFLOAT11, additional_config={"dfloat11": {"ignore": ignore}}):
            pass


def drafting(target: Path, method: str, model: Path) -> dict[str, Any]:
    drafter = dict(method=method, model=str(model), num_speculative_tokens=1, **DFLOAT11)
    return dict(model=target, is_draft=True, speculative_config=drafter, **DFLOAT11)


def eagle(target: Path, path: Path) -> Path:
    """Write a draft model for `target` without embedding and LM head: vLLM uses the target's."""
    if vllm.__version__.startswith("0.28."):
        pytest.skip("vLLM 0.28 has no quantization for an EAGLE draft whose checkpoint names none")
    shutil.copytree(target, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            weight = tensors.pop(name)
            if ".layers.0." in name and "input_layernorm" not in name:
                tensors[name.removeprefix("model.")] = weight
        tensors["fc.weight"] = torch.full((64, 128), 0.02, dtype=torch.bfloat16)

    return tiny_models.edit(path, change)


def test_draft_whose_embedding_is_the_targets_is_not_refused(small: Models, tmp_path: Path) -> None:
    target = small("llama")
    with loaded(**drafting(target, "eagle", eagle(target, tmp_path / "draft"))) as model:
        assert not model.has_own_embed_tokens


@pytest.mark.parametrize(
    ("method", "name", "message"),
    [
        ("draft_model", "model.norm.weight", "not initialized from checkpoint: {'model.norm.weight'}"),
        ("draft_model", "lm_head.weight", "lm_head.weight: 0 of 4096 weights arrived"),
        ("eagle", "fc.weight", "fc.weight: 0 of 8192 weights arrived"),
    ],
)  # fmt: skip
def test_draft_that_lacks_a_tensor_is_refused(
    method: str, name: str, message: str, small: Models, tmp_path: Path
) -> None:
    target = small("llama")
    whole = eagle(target, tmp_path / "whole") if method == "eagle" else target
    draft = without(whole, tmp_path / "draft", name)
    with pytest.raises(UnsupportedError) as raised, loaded(**drafting(target, method, draft)):
        pass
    assert str(raised.value).startswith(f"{draft}: ")
    assert message in str(raised.value)


def test_weights_that_a_model_writes_past_the_loaders_are_not_lost_in_silence(
    tmp_path: Path,
) -> None:
    # Bug caught: gpt-oss reported experts and sinks as loaded, but kept the old ones.
    first, second = (
        tiny_models.gpt_oss(tmp_path / "first", 0),
        tiny_models.gpt_oss(tmp_path / "second", 1),
    )
    with loaded(first, quantization="dfloat11") as model:
        before = {
            name: parameter.clone()
            for name, parameter in model.named_parameters()
            if "sinks" in name
        }
        with pytest.raises(
            UnsupportedError, match=r"past vLLM's weight loaders.* All weights are as before"
        ):
            model.load_weights(load_file(second / "model.safetensors").items())
        after = dict(model.named_parameters())
        assert before
        assert all(torch.equal(after[name], before[name]) for name in before)


def test_weights_that_a_model_copies_into_whole_parameters_are_loaded_and_updated(
    tmp_path: Path,
) -> None:
    # Bug caught: NemotronParse was refused, because such a copy into a layer on the meta device was lost.
    nemotron_parse.save(tmp_path / "m")
    nemotron_parse.save(tmp_path / "other", seed=1)
    with loaded(tmp_path / "m", trust_remote_code=True, **DFLOAT11) as model, decoded_by_detach():
        for folder in ("m", "other"):
            given = load_file(tmp_path / folder / "model.safetensors")
            if folder == "other":
                model.load_weights(given.items())
            for name in ("lm_head", "encoder.sum_proj", "encoder.conv1"):
                held = model.get_submodule(name).weight.detach()
                assert torch.equal(
                    held.view(torch.uint16), given[f"{name}.weight"].view(torch.uint16)
                ), (folder, name)


def test_gpt_oss_of_an_official_checkpoint_is_the_same_model(tmp_path: Path) -> None:
    # Bug caught: RuntimeError for a slice of a compressed weight that takes all of it.
    model = tiny_models.gpt_oss(tmp_path / "m", 0)
    compress(open_source(model), tmp_path / "df11", workers=1)
    held = []
    for folder in (model, tmp_path / "df11"):
        with loaded(folder, quantization="dfloat11") as made, decoded_by_detach():
            experts = made.get_submodule("model.layers.0.mlp.experts")
            held.append(
                {name: tensor.detach().clone() for name, tensor in experts.named_parameters()}
            )
            # Bug caught: only experts whose class is named exactly RoutedExperts counted as such.
            assert (
                report.summarize(made).num_experts == 1
            )  # vLLM has a class for gpt-oss since 0.30
    assert held[0].keys() == held[1].keys() != set()
    assert all(torch.equal(held[0][name], held[1][name]) for name in held[0])
