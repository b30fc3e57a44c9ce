"""Random weights are as described, and the report's figures follow from the samples."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.serve import half_fast, model
from bench.serve.options import VARIANTS
from bench.serve.plot import COLOURS, MARKERS
from bench.serve.report import RESULTS, default_output, merge
from safetensors.torch import load_file


def test_random_weights_are_bf16_with_the_deviation_of_fresh_models_and_are_written_once(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "tiny"
    model.write_random("tiny", folder)
    files = sorted(folder.glob("*.safetensors"))
    weights = {name: w for file in files for name, w in load_file(file).items()}
    config = json.loads((folder / "config.json").read_text())
    shapes = [s for part in model.tensor_shapes(config) for s in part.items()]
    assert {name: tuple(w.shape) for name, w in weights.items()} == dict(shapes)
    for name, weight in weights.items():
        assert weight.dtype == torch.bfloat16
        if weight.dim() == 2:
            assert abs(weight.float().std().item() - 0.02) < 5e-4, name
            assert abs(weight.float().mean().item()) < 5e-4, name
    times = [file.stat().st_mtime_ns for file in files]
    model.write_random("tiny", folder)
    assert [file.stat().st_mtime_ns for file in files] == times


def test_interrupted_weights_are_written_anew(tmp_path: Path) -> None:
    # Bug caught: a half-written folder is served.
    model.write_random("tiny", tmp_path)
    whole = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    (tmp_path / "config.json").unlink()
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model-00002-of-00003.safetensors").write_bytes(b"half")
    model.write_random("tiny", tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == whole


def test_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(model.BenchError, match=r"holds thesis\.tex of something else"):
        model.write_random("tiny", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_sizes_of_the_shapes_are_those_of_the_models() -> None:
    expected = {"llama-3.1-8b": 8_030_261_248, "llama-3.2-1b": 1_235_814_400}
    blocks = 30_532_122_624 - 2 * 151936 * 2048 - 2048  # of Qwen3-30B-A3B
    expected["qwen3-30b-a3b-12"] = blocks // 4 + 2 * 151936 * 2048 + 2048
    for name, parameters in expected.items():
        config = {**model.LLAMA, **model.SHAPES[name]}
        found = sum(map(model.num_bytes, model.tensor_shapes(config)))
        assert found == 2 * parameters, name


def test_figures_are_those_of_all_samples_of_all_runs() -> None:
    def point(*ms: float, **more: Any) -> dict[str, Any]:
        return {"kind": "decode", "batch": 4, "context": 8, **({"ms": ms} if ms else {}), **more}

    gap = point(not_run="the budget was spent")
    (got,) = merge([[point(1, 2, 3, 4, 5)], [gap], [point(6, 7, 8, 9, 10, 11)]])
    assert (got["low"], got["ms"], got["high"]) == (2, 6, 10)
    assert got["median_by_run"] == [3, 8.5]
    assert got["tokens_per_s"] == pytest.approx(4 / 0.006, abs=0.1)
    assert merge([[gap], [gap]]) == [gap]


def test_results_of_a_gpu_never_overwrite_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, date = "NVIDIA H100 80GB HBM3", "2026-01-02T03:04:05+00:00"
    assert default_output(name, date).parent == RESULTS / "h100-80gb-hbm3"
    # Not by the module's name, which others may have imported anew: results would be written here.
    monkeypatch.setitem(default_output.__globals__, "RESULTS", tmp_path)
    for expected in ("serve-2026-01-02.json", "serve-2026-01-02-2.json"):
        path = default_output(name, date)
        assert path.name == expected
        path.parent.mkdir(exist_ok=True)
        path.touch()


def test_every_variant_has_a_colour_and_a_mark_of_its_own() -> None:
    # Bug caught: an hour of results, and no table, because a new variant could not be drawn.
    assert set(COLOURS) == set(VARIANTS)
    assert len(set(COLOURS.values())) == len(set(MARKERS.values())) == len(VARIANTS)


@pytest.mark.parametrize(("layers", "room"), [(225, 100_000), (10, 18_900_000), (1, 500), (2, 3)])
def test_as_many_tokens_are_asked_for_as_make_half_of_the_layers_fast(
    layers: int, room: int
) -> None:
    def choose(tokens: int) -> half_fast.Choice:
        fast = min(layers, max(0, (room - tokens) // 50))
        return frozenset(map(str, range(fast))), f"{fast} fast with {tokens} tokens"

    if not choose(1)[0]:
        with pytest.raises(ValueError, match="0 fast with 1 tokens"):
            half_fast.halving(choose)
        return
    tokens, told = half_fast.halving(choose)
    assert told == f"{layers // 2} fast with {tokens} tokens"
    assert 2 * len(choose(tokens - 1)[0]) > layers


def test_tokens_are_chosen_only_for_layout_auto_that_has_none() -> None:
    def wanted(**options: Any) -> bool:
        return half_fast.is_wanted({"additional_config": {"dfloat11": options}})

    assert wanted(layout="auto")
    assert not wanted(layout="auto", kv_tokens=5)
    assert not wanted(layout="fast")
    assert not half_fast.is_wanted({})


def test_half_of_a_models_matrices_are_fast_by_the_choice_that_vllm_will_make(
    tmp_path: Path,
) -> None:
    # Bug caught: the plan's choice is called as it was called before, and no engine of the variant starts.
    model.write_random("tiny", tmp_path / "tiny")
    asked = {
        "skip_tokenizer_init": True,
        "max_model_len": 100,
        "enforce_eager": True,
        "quantization": "dfloat11",
        "additional_config": {"dfloat11": {"layout": "auto"}},
    }
    given, told = half_fast.with_half_fast(tmp_path / "tiny", asked)
    assert told.startswith("auto: 4 of 10 matrices fast")
    assert given["additional_config"]["dfloat11"]["kv_tokens"] > 100
    assert "kv_tokens" not in asked["additional_config"]["dfloat11"]
