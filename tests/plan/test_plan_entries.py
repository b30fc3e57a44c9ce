"""`plan` reads configs of any content: an entry of an unexpected type gives an error of one sentence."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from cli_commands import only_line

from vllm_dfloat.cli import main

CONFIGS = sorted((Path(__file__).parents[1] / "data" / "configs").glob("*.json"))
VALUES: list[Any] = [
    0, -1, 1.5, 7, 10**30, float("nan"), "x", "3", True, False, None, [], {}, [1, 2], ["x"], [[]], [None], {"a": 1},
]  # fmt: skip
# Entries that the plan reads, but that these configs may lack.
MORE = (
    "mlp_only_layers", "decoder_sparse_step", "moe_layer_freq", "n_shared_experts", "topk_method", "kv_lora_rank",
    "q_lora_rank", "layer_types", "no_rope_layers", "attention_chunk_size", "sliding_window", "use_sliding_window",
    "max_window_layers", "rope_parameters", "rope_scaling", "partial_rotary_factor", "is_encoder_decoder", "dtype",
    "torch_dtype", "model_type", "mlp_bias", "attention_bias", "tie_word_embeddings", "head_dim", "index_topk",
)  # fmt: skip
KINDS = [  # a config of each kind of model that the plan knows
    "DeepSeek", "Llama-3.1-8B.", "Llama-4", "Qwen3-30B", "Qwen2.5-VL", "Qwen3-VL", "gemma-3", "llava", "Mixtral",
    "Mistral-Small",
]  # fmt: skip


def small(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config with few transformer blocks, so that a plan takes milliseconds."""
    for part in (config, config.get("text_config"), config.get("vision_config")):
        for name in ("num_hidden_layers", "depth"):
            if isinstance(part, dict) and name in part:
                part[name] = 2
    return config


def places(config: dict[str, Any]) -> Iterator[list[str]]:
    """Yield the path of keys to every entry, including entries of nested configs."""
    for part in ([], ["text_config"], ["vision_config"], ["rope_scaling"], ["rope_parameters"]):
        inner = config.get(part[0]) if part else config
        if not isinstance(inner, dict):
            continue
        names = list(inner)
        if (
            isinstance(config.get("text_config"), dict) == (part == ["text_config"])
            and len(part) < 2
        ):
            names += [name for name in MORE if name not in inner]
        yield from ([*part, name] for name in names)


def test_the_kinds_are_there() -> None:
    assert all(any(kind.lower() in f.name.lower() for f in CONFIGS) for kind in KINDS), CONFIGS


@pytest.mark.parametrize("kind", KINDS)
def test_any_value_of_any_entry_is_planned_or_a_sentence(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Bug caught: "internal error, TypeError" for mlp_only_layers that is a number, or model_type that is a list.
    file = next(f for f in CONFIGS if kind.lower() in f.name.lower())
    original = small(json.loads(file.read_text()))
    (tmp_path / "m").mkdir()
    changed = tmp_path / "m/config.json"
    for *part, name in places(original):
        for value in VALUES:
            config = json.loads(json.dumps(original))
            inner = config
            for step in part:
                inner = inner[step]
            inner[name] = value
            changed.write_text(json.dumps(config))
            status = main(["plan", str(changed), "--gpu-memory", "24GiB", "--json"])
            out, err = capsys.readouterr()
            assert status in (0, 1, 2), (part, name, value)
            if status == 2:
                assert "internal error" not in only_line(err), (part, name, value, err)
            else:
                assert err == "", (part, name, value, err)
                assert "NaN" not in out


def test_a_size_above_the_limit_is_told_the_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Bug caught: "is 1000000000000; expected a positive integer".
    config = json.loads(next(f for f in CONFIGS if "Llama-3.1-8B." in f.name).read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 10**12}))
    assert main(["plan", str(tmp_path), "--gpu-memory", "24GiB"]) == 2
    assert only_line(capsys.readouterr().err).endswith("expected an integer from 1 to 4294967296.")


@pytest.mark.parametrize(
    ("sizes", "told"), [([64, 256], ""), ([64, "x"], "intermediate_size[1] is")]
)
def test_a_size_per_layer_counts_as_the_largest(
    sizes: list[Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Bug caught: of Gemma 3n, whose config has such a list, there was no plan.
    model = tiny_models.save("llama", tmp_path / "m", intermediate_size=256)
    of_one = main(["plan", str(model), "--gpu-memory", "2GiB"]), capsys.readouterr().out
    config = json.loads((model / "config.json").read_text())
    config |= {"intermediate_size": sizes, "architectures": ["OtherForCausalLM"]}
    (model / "config.json").write_text(json.dumps(config))
    assert main(["plan", str(model), "--gpu-memory", "2GiB"]) == (2 if told else of_one[0])
    out, err = capsys.readouterr()
    assert told in err
    other = [line for line in (out, of_one[1]) for line in line.splitlines() if "other  " in line]
    assert told or other[0] == other[1]
