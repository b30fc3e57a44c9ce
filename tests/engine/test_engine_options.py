"""Options that users give, and the errors for those that cannot work."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from conftest import Checkpoint
from engines import answers, ask, bf16_answers, engine

from vllm_dfloat.device.scratch import scratch
from vllm_dfloat.errors import UnsupportedError

pytestmark = pytest.mark.engine


def options(**given: Any) -> dict[str, Any]:
    """Return the engine settings of `--quantization dfloat11 --additional-config ...`."""
    return dict(quantization="dfloat11", additional_config={"dfloat11": given})


def changed_config(source: Path, path: Path, **changes: Any) -> Path:
    shutil.copytree(source, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    return path


def summary(lines: list[str]) -> str:
    found = [line for line in lines if line.startswith("dfloat11: compressed")]
    assert len(found) == 1
    return found[0]


def test_ignored_layers_stay_bf16_and_change_nothing(
    bf16_checkpoint: Checkpoint, log_lines: list[str]
) -> None:
    model = bf16_checkpoint("llama")
    parts = [
        f"model.layers.0.self_attn.{part}_proj" for part in "qkv"
    ]  # all parts of a fused layer
    ignore = ["re:.*down_proj", "lm_head", *parts]
    assert answers(model, **options(ignore=ignore)) == bf16_answers(model)
    assert "compressed 6 of 10 layers" in summary(log_lines)


def test_ignore_in_the_checkpoints_own_config_needs_no_flag(
    bf16_checkpoint: Checkpoint, log_lines: list[str]
) -> None:
    given = {"quant_method": "dfloat11", "ignore": ["model.embed_tokens", "lm_head"]}
    with engine(bf16_checkpoint("llama"), hf_overrides={"quantization_config": given}):
        assert "compressed 8 of 10 layers" in summary(log_lines)


def test_an_official_checkpoints_config_may_have_options_too(
    bf16_checkpoint: Checkpoint, tmp_path: Path, log_lines: list[str]
) -> None:
    # Bug caught: options without a quant_method hid that the checkpoint is a DFloat11 one.
    given = {"ignore": ["lm_head"]}
    model = changed_config(
        tiny_models.official("llama-tiny"), tmp_path / "m", quantization_config=given
    )
    assert answers(model) == bf16_answers(bf16_checkpoint("llama-tiny"))
    assert "of 10 layers" in summary(log_lines)


def test_embedding_decides_for_a_tied_head(
    bf16_checkpoint: Checkpoint, log_lines: list[str]
) -> None:
    model = bf16_checkpoint("qwen3")
    assert answers(model, **options(ignore=["lm_head"])) == bf16_answers(model)
    assert "compressed 9 of 9 layers" in summary(log_lines)


@pytest.mark.parametrize("ignore", [[], ["lm_head", "re:.*embed_tokens"]])
def test_a_tied_head_of_vllms_transformers_backend_answers_as_bf16(
    ignore: list[str], bf16_checkpoint: Checkpoint
) -> None:
    # Bug caught: the first request died, since that backend asks the LM head for its bias, and an embedding has none.
    model, backend = bf16_checkpoint("qwen3"), dict(model_impl="transformers")
    assert answers(model, **options(ignore=ignore), **backend) == bf16_answers(model, **backend)


def test_half_ignored_fused_layer_is_refused(bf16_checkpoint: Checkpoint) -> None:
    ignore = ["model.layers.0.self_attn.q_proj"]
    with (
        pytest.raises(UnsupportedError, match=r"of model.layers.0.self_attn.qkv_proj only a part"),
        engine(bf16_checkpoint("llama"), **options(ignore=ignore)),
    ):
        pass


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            options(ignored=["lm_head"]),
            "unknown option 'ignored'; expected ignore, layout, mode, granularity",
        ),
        (options(ignore="lm_head"), "ignore is 'lm_head'; expected a list"),
        (options(ignore=["re:("]), "no regular expression"),
        (options(mode="fast"), "mode: 'fast'; expected one of exact"),
        (dict(quantization="dfloat11", load_format="sharded_state"), "--load-format sharded_state"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(
    settings: dict[str, Any], message: str, bf16_checkpoint: Checkpoint
) -> None:
    with (
        pytest.raises(UnsupportedError, match=message),
        engine(bf16_checkpoint("llama"), **settings),
    ):
        pass


def test_float16_is_refused_by_vllm(tmp_path: Path) -> None:
    model = tiny_models.save("llama", tmp_path, torch.float16)
    with (
        pytest.raises(ValueError, match=r"float16 is not supported for quantization method dfl"),
        engine(model, quantization="dfloat11"),
    ):
        pass


@pytest.mark.on_demand
def test_float32_checkpoint_is_served_as_bf16_when_asked_for(tmp_path: Path) -> None:
    model = tiny_models.save("llama", tmp_path, torch.float32)
    as_bf16 = dict(dtype="bfloat16")
    assert answers(model, quantization="dfloat11", **as_bf16) == bf16_answers(model, **as_bf16)


def test_checkpoint_quantized_otherwise_is_refused_by_vllm(
    bf16_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    model = changed_config(bf16_checkpoint("llama"), tmp_path / "model", quantization_config=fp8)
    with (
        pytest.raises(ValueError, match="does not match the quantization"),
        engine(model, quantization="dfloat11"),
    ):
        pass


def test_matrices_that_would_not_shrink_stay_bf16_and_are_named(
    tmp_path: Path, log_lines: list[str]
) -> None:
    small = dict(hidden_size=32, num_attention_heads=1, num_key_value_heads=1)
    model = tiny_models.save("llama", tmp_path, **small)
    assert answers(model, quantization="dfloat11") == bf16_answers(model)
    assert "compressed 6 of 10 layers" in summary(log_lines)
    names = [f"model.layers.{i}.self_attn.{kind}_proj" for i in range(2) for kind in ("qkv", "o")]
    assert f"dfloat11: held as BF16, would not shrink: {', '.join(names)}" in log_lines


def test_comparison_notices_one_changed_bit(bf16_checkpoint: Checkpoint, tmp_path: Path) -> None:
    # Bug caught: a comparison that could not fail.
    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"].view(torch.int16)[3, 5] ^= -32768

    model = bf16_checkpoint("llama")
    other = tiny_models.edit(shutil.copytree(model, tmp_path / "other"), flip)
    assert answers(other, quantization="dfloat11") != bf16_answers(model)


@pytest.mark.on_demand
def test_reloaded_engine_answers_as_one_that_was_started_so(
    bf16_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    other = tiny_models.save("llama", tmp_path / "other", seed=7)
    with engine(bf16_checkpoint("llama"), quantization="dfloat11") as llm:
        before = ask(llm)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        after = ask(llm)
    assert after != before
    assert after == bf16_answers(other)


@pytest.mark.on_demand
def test_made_up_weights_are_compressed_too(
    bf16_checkpoint: Checkpoint, log_lines: list[str]
) -> None:
    model = bf16_checkpoint("llama")
    dummy = dict(load_format="dummy")
    assert answers(model, quantization="dfloat11", **dummy) == bf16_answers(model, **dummy)
    assert "compressed 10 of 10 layers" in summary(log_lines)


def test_experts_are_compressed_and_the_line_says_so(
    bf16_checkpoint: Checkpoint, log_lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    take = scratch.take

    def poisoned(*args: Any) -> Any:
        out, status = take(*args)
        return out.fill_(float("nan")), status

    monkeypatch.setattr(scratch, "take", poisoned)
    model = bf16_checkpoint("qwen3_moe")
    assert answers(model, quantization="dfloat11") == bf16_answers(model)
    assert "compressed 8 of 10 layers" in summary(log_lines)  # the routers stay
    assert "; of these the experts of 2 layers " in summary(log_lines)


def test_official_single_file_checkpoint_takes_its_config_from_elsewhere(
    bf16_checkpoint: Checkpoint,
) -> None:
    original = bf16_checkpoint("llama-tiny-single")
    settings = dict(hf_config_path=str(original), quantization="dfloat11")
    assert answers(tiny_models.official("llama-tiny-single"), **settings) == bf16_answers(original)
