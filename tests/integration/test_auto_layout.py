"""Layout "auto": what vLLM's settings and the options make of the plan, and what is said where there is none."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import architectures
import pytest
import torch
from conftest import Checkpoint
from engines import engine
from model_loads import loaded
from vllm.platforms import current_platform

from vllm_dfloat.cli import main
from vllm_dfloat.integration.layers.method import weights_of
from vllm_dfloat.integration.loading.auto_layout import choose
from vllm_dfloat.integration.seam.options import Options


def settings(model: Path, **cache: Any) -> Any:
    """Return what `choose` reads of a VllmConfig."""
    memory = dict(gpu_memory_utilization=0.9, kv_cache_memory_bytes=None, enable_prefix_caching=False)  # fmt: skip
    return SimpleNamespace(
        cache_config=SimpleNamespace(
            **{**memory, "cache_dtype": "auto", "mamba_ssm_cache_dtype": "auto", **cache}
        ),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            data_parallel_size=1,
            enable_expert_parallel=False,
        ),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=2048, max_num_seqs=4),
        model_config=SimpleNamespace(model=str(model), max_model_len=128, dtype=None),
    )


def test_with_a_plan_some_layers_are_fast(bf16_checkpoint: Checkpoint) -> None:
    layers, _ = choose(settings(bf16_checkpoint("llama")), Options())
    assert layers


SCRIPT = Path(__file__).parents[1] / "choosing_ranks.py"
CONFIGS = Path(__file__).parents[1] / "data" / "configs"
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.fixture
def gpu_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function: GiB -> the memory that vLLM's platform tells of from then on."""

    def has(gib: int) -> None:
        monkeypatch.setattr(current_platform, "get_device_total_memory", lambda: gib << 30)

    return has


def of_config(name: str, max_model_len: int, **parallel: Any) -> Any:
    config = settings(CONFIGS / f"{name}.json", gpu_memory_utilization=0.92)
    config.model_config.max_model_len = max_model_len
    config.parallel_config.__dict__.update(parallel)
    return config


def test_a_wish_below_one_request_leaves_room_for_the_request(
    gpu_of: Callable[[int], None],
) -> None:
    # Bug caught: vLLM did not start, since it needs room for one request; with all matrices packed it does.
    gpu_of(24)
    layers, line = choose(of_config("Llama-3.1-8B", 75_000), Options(layout="auto", kv_tokens=1000))
    asked, told = choose(of_config("Llama-3.1-8B", 75_000), Options(layout="auto"))
    assert (layers, line) == (asked, told)
    assert 0 < len(layers) < 129
    assert "which should leave 75,000 tokens of KV cache" in line
    fitted = of_config(
        "Llama-3.1-8B", 131_072
    )  # --max-model-len auto: as long as there is room for
    fitted.model_config.original_max_model_len = -1
    assert len(choose(fitted, Options(layout="auto", kv_tokens=1000))[0]) == 129


@pytest.mark.parametrize("ignore", ["re:.*(gate|up)_proj", "re:.*gate_up_proj"])
def test_ignored_layers_are_counted_as_bf16(ignore: str, gpu_of: Callable[[int], None]) -> None:
    # Bug caught: they were counted as packed, and others were held fast in memory that there is not.
    gpu_of(24)
    wish = Options(layout="auto", kv_tokens=40_000, ignore=(ignore,))
    layers, line = choose(of_config("Llama-3.1-8B", 8192), wish, FUSED)
    without, _ = choose(of_config("Llama-3.1-8B", 8192), replace(wish, ignore=()), FUSED)
    assert layers < without
    assert line.startswith(f"auto: {len(layers)} of 98 matrices fast")
    nothing = choose(of_config("Llama-3.1-8B", 8192), replace(wish, ignore=("re:.*",)), FUSED)
    assert nothing == (
        frozenset(),
        "auto: there is nothing to choose, since all matrices stay BF16",
    )


def test_an_engine_chooses_as_plan_does_with_the_bits_that_it_assumes(
    bf16_checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    # What docs/planning.md says of --code-bits: without it, plan measures weights that are there.
    model, memory = bf16_checkpoint("llama"), current_platform.get_device_total_memory()
    command = ["plan", str(model), "--gpu-memory", f"{memory}B", "--gpu-memory-utilization", "0.9"]
    command += ["--max-model-len", "128", "--max-num-seqs", "4", "--max-num-batched-tokens", "2048"]
    command += ["--no-enable-prefix-caching", "--json", "--code-bits", "2.7", "--layout"]

    def planned(*layout: str) -> Any:
        assert main([*command, *layout]) == 0
        return json.loads(capsys.readouterr().out)

    least, most = (planned(layout)["dfloat11"]["kv_tokens"] for layout in ("fast", "packed"))
    tokens = (least + most) // 2
    told = choose(settings(model), Options(layout="auto", kv_tokens=tokens))[1]
    assert told in planned("auto", "--kv-tokens", str(tokens))["notes"]
    assert " 10 matrices fast" in told


def test_a_head_in_another_dtype_is_counted_as_bf16(gpu_of: Callable[[int], None]) -> None:
    # Bug caught: it was counted as compressed, and stays BF16.
    gpu_of(80)
    config = of_config("Llama-3.1-8B", 8192)
    config.model_config.__dict__.update(dtype=torch.bfloat16, head_dtype=torch.float32)
    config.model_config.hf_text_config = SimpleNamespace(tie_word_embeddings=False)
    assert "128 of 129 matrices fast" in choose(config, Options(layout="auto"))[1]
    config.model_config.hf_text_config.tie_word_embeddings = True
    assert "128 of 128 matrices fast" in choose(config, Options(layout="auto"))[1]


def test_the_mode_of_the_engine_counts(gpu_of: Callable[[int], None], tmp_path: Path) -> None:
    # Bug caught: down_proj, which is decoded in every mode, took the memory of matrices that are multiplied.
    gpu_of(24)
    sizes = json.loads((CONFIGS / "Llama-3.1-8B.json").read_text())
    (tmp_path / "uneven.json").write_text(json.dumps({**sizes, "intermediate_size": 14400}))
    config = of_config("Llama-3.1-8B", 8192)
    config.model_config.model = str(tmp_path / "uneven.json")
    wish = Options(layout="auto", kv_tokens=72_000)
    for mode in ("fused", "fused-exact"):
        layers, _ = choose(config, replace(wish, mode=mode))
        assert "lm_head" in layers
    assert "lm_head" not in choose(config, wish)[0]


def test_ranks_with_different_memory_and_files_choose_alike(
    bf16_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    # Bug caught: each rank chose by the memory of its node's first GPU, and by its own files.
    command = [sys.executable, str(SCRIPT), str(bf16_checkpoint("llama")), str(tmp_path)]
    subprocess.run(command, check=True, timeout=300)
    first, second = (json.loads((tmp_path / str(rank)).read_text()) for rank in range(2))
    alone = second.pop("alone")
    assert first.pop("alone") != alone  # which has less memory
    assert first == second
    assert first["together"] == alone
    assert 0 < len(alone[0]) < 129
    assert set(first["loaded"].values()) == {"packed"}
    layers, line = first["without the first's files"]
    assert not layers
    assert line.startswith("auto: all layers are packed, since the plan is not known: missing")
    assert first["without the second's files"] == alone


def test_experts_that_engines_share_are_counted_once(gpu_of: Callable[[int], None]) -> None:
    # Bug caught: --data-parallel-size was not counted, and what the plan for it holds fast was packed.
    gpu_of(48)
    alone, shared = (
        choose(of_config("Qwen3-30B-A3B", 8192, data_parallel_size=count), Options(layout="auto"))
        for count in (1, 2)
    )
    assert len(alone[0]) < len(shared[0])


@pytest.mark.parametrize("name", ["Exaone4ForCausalLM", "GptOssForCausalLM"])
def test_layers_of_a_model_that_is_estimated_are_fast_as_the_line_says(
    name: str, tmp_path: Path, log_lines: list[str]
) -> None:
    # Bug caught: q_proj, k_proj and v_proj were to be fast by the plan, and vLLM's qkv_proj was packed.
    model = architectures.save_case(name, tmp_path / "m")
    auto = {"dfloat11": {"layout": "auto", "kv_tokens": 1}}
    with engine(model, quantization="dfloat11", additional_config=auto) as llm:
        served = llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
        asked = {
            module.quant_method.name: module.quant_method.asked_layout
            for module in served.modules()
            if weights_of(module)
        }
    packed = [layer for layer, layout in asked.items() if layout == "packed"]
    assert [layer.rpartition(".")[2] for layer in packed] in (["embed_tokens"], ["embedding"])


def test_a_wish_for_tokens_without_room_is_a_warning(
    bf16_checkpoint: Checkpoint, log_lines: list[str]
) -> None:
    wish = Options(layout="auto", kv_tokens=10**12)
    assert choose(settings(bf16_checkpoint("llama")), wish)[0] == frozenset()
    (line,) = log_lines
    assert line.startswith(
        "dfloat11: kv_tokens 1,000,000,000,000: even with all matrices packed there is room"
    )
    assert "VLLM_CPU_KVCACHE_SPACE" not in line


def test_the_warning_tells_of_a_kv_cache_of_fixed_size(
    bf16_checkpoint: Checkpoint, log_lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Bug caught: "room for about N tokens", which that engine cannot have.
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    auto = {"dfloat11": {"layout": "auto", "kv_tokens": 10**12}}
    model = bf16_checkpoint("llama")
    with loaded(model, quantization="dfloat11", additional_config=auto):
        pass
    (line,) = [line for line in log_lines if "kv_tokens 1,000,000,000,000" in line]
    assert line.endswith(
        ". Whatever there is room for, vLLM takes the 1,073,741,824 bytes of KV cache that --kv-cache-memory-bytes "
        "or VLLM_CPU_KVCACHE_SPACE asks for."
    )


@pytest.mark.parametrize("case", ["another dtype of the KV cache", "a name too long for a file"])
def test_without_a_plan_all_are_packed_and_the_line_has_advice_for_an_engine(
    case: str, bf16_checkpoint: Checkpoint
) -> None:
    # Bugs caught: the only advice was to give another dtype; a traceback of the name that is too long.
    if case.startswith("another"):
        layers, line = choose(settings(bf16_checkpoint("llama"), cache_dtype="nvfp4"), Options())
    else:
        layers, line = choose(settings(Path("x" * 5000)), Options())
    assert not layers
    assert line.startswith("auto: all layers are packed, since the plan is not known: ")
    assert line.endswith('Or choose the layout yourself, "fast" or "packed".')
