"""What is compared with BF16 vLLM for each architecture of the table; also a script that runs and records it.

    python tests/architecture_features.py OUT.json [--features ...] [--part K/N] [NAME ...]

writes, for each architecture and feature, "equal", or why not; tests/architectures.py makes the table of it. The record
is of a CPU with AMX.
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import conftest  # noqa: F401  # first: settings that must be made before vLLM is imported
import lora_adapters
import plan_engines
import torch
from engine_pairs import TRACED
from engines import SETTINGS, Answers, answers, ask, bf16_answers, engine
from safetensors.torch import load_file

from vllm_dfloat.errors import UnsupportedError

OURS: dict[str, Any] = dict(quantization="dfloat11")
EQUAL = "equal"
ROOM = 2 << 30  # bytes for weights, scratch and KV cache
CPU_BLOCK = 128  # tokens in a block of vLLM's KV cache on a CPU
NEAR = 0.02  # relative error of a plan


def is_number(found: Answers) -> bool:
    """Return whether there is no NaN, which equals nothing and hides everything behind it."""
    positions = [position for answer in found for position in answer["logprobs"]]
    return all(not math.isnan(value) for position in positions for _, value in position)


def from_bf16_files(folder: Path) -> str:
    model = folder / "m"
    try:
        expected = bf16_answers(model)
    except (Exception, SystemExit) as error:
        return f"BF16 vLLM: {type(error).__name__}: {error}"
    assert is_number(expected)
    assert answers(model, **OURS) == expected
    return EQUAL


def from_dfloat11_files(folder: Path) -> str:
    from vllm_dfloat.convert.compress import compress
    from vllm_dfloat.convert.source import open_source

    model = folder / "m"
    compress(open_source(model), folder / "df11", workers=1)
    assert answers(folder / "df11") == bf16_answers(model)
    return EQUAL


def refused(update: Callable[[], Any]) -> str:
    """Return why an update was refused, with all weights as before; empty if it took effect."""
    try:
        update()
    except UnsupportedError as error:
        return str(error) if "All weights are as before" in str(error) else f"half done: {error}"
    return ""


def updated(folder: Path) -> str:
    """Start from other weights, and give those of the table to the model's load_weights."""

    model = folder / "m"
    tensors = load_file(model / "model.safetensors")
    expected = bf16_answers(model)
    with engine(folder / "other", **OURS) as llm:
        before = ask(llm)
        assert before != expected
        served = llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
        refusal = refused(lambda: served.load_weights(tensors.items()))
        if refusal:
            assert ask(llm) == before
            return f"refused: {refusal}"
        assert ask(llm) == expected
    return EQUAL


def with_adapters(folder: Path) -> str:
    """Compare a LoRA adapter on every linear layer of the blocks that vLLM lets have one."""
    model = folder / "m"
    adapter = lora_adapters.save(model, folder / "adapter", 3)
    found = []
    for settings in ({}, OURS):
        try:
            with engine(model, **lora_adapters.ENGINE, **settings) as llm:
                found.append(lora_adapters.ask(llm, adapter))
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    assert found[0] == found[1]
    if isinstance(found[0], str):
        return f"BF16 vLLM: {found[0]}"
    without, adapted = found[0]
    return EQUAL if without != adapted else "BF16 vLLM: the adapter has no effect"


def traced(folder: Path) -> str:
    """Compare models traced by Dynamo, as before compilation; Inductor itself takes a minute a model."""
    model = folder / "m"
    settings = dict(enforce_eager=False, **TRACED)
    try:
        expected = bf16_answers(model, **settings)
    except Exception as error:
        return f"BF16 vLLM: {type(error).__name__}: {error}"
    assert answers(model, **OURS, **settings) == expected
    return EQUAL


def planned(folder: Path) -> str:
    """Compare what `plan` says of the files with the bytes and KV tokens of an engine."""
    from vllm_dfloat.plan.plan import make_plan
    from vllm_dfloat.plan.settings import Settings

    found = plan_engines.reported(folder / "m", ROOM, **OURS)
    settings = Settings(
        gpu_memory=ROOM, gpu_memory_utilization=1, max_model_len=SETTINGS["max_model_len"], block_size=CPU_BLOCK,
        max_num_batched_tokens=plan_engines.BATCHED_TOKENS, slots=1, overhead=0,
        prefix_caching=SETTINGS["enable_prefix_caching"], mamba_ssm_cache_dtype=found["state_dtype"],
    )  # fmt: skip
    try:
        plan = make_plan(str(folder / "m"), settings)
    except UnsupportedError as error:
        return f"no plan: {error}"
    (rank,), (served,) = plan.ranks, found["ranks"]
    off = {
        "BF16": rank.bf16_weights / served["bf16_bytes"],
        "DFloat11": rank.dfloat11_weights / served["held_bytes"],
        "KV tokens": plan.dfloat11.tokens / found["tokens_of_room"],
    }
    told = ", ".join(f"{name} {100 * ratio - 100:+.1f} %" for name, ratio in off.items())
    return EQUAL if all(abs(ratio - 1) <= NEAR for ratio in off.values()) else f"estimate: {told}"


FEATURES: dict[str, Callable[[Path], str]] = {
    "BF16 files": from_bf16_files,
    "DFloat11 files": from_dfloat11_files,
    "update": updated,
    "LoRA": with_adapters,
    "traced": traced,
    "plan": planned,
}


def expected_here(recorded: str) -> str:
    """Return the kind of result that this CPU gives, of one recorded with AMX: "equal", or the words before a colon.

    With AMX, vLLM frees a weight of latent attention that an update would need.
    """
    is_of_amx = recorded.startswith("refused: ") and "kv_b_proj" in recorded
    if is_of_amx and not torch.cpu._is_amx_tile_supported():
        return EQUAL
    return recorded.partition(":")[0]


def prepare(name: str, folder: Path) -> Path:
    """Write the checkpoints of an architecture, the one of the table and another, into a folder, and return it."""
    architectures.save_case(name, folder / "m")
    architectures.save_case(name, folder / "other", seed=7)
    return folder


def record(names: list[str], features: list[str], out: Path) -> None:
    """Run features of architectures and write what came of each, one after the other."""
    found: dict[str, dict[str, str]] = json.loads(out.read_text()) if out.exists() else {}
    for name in names:
        missing = [feature for feature in features if found.get(name, {}).get(feature) != EQUAL]
        folder = Path(tempfile.mkdtemp(prefix="architecture-"))
        for feature in missing:
            try:
                if feature == missing[0]:
                    prepare(name, folder)
                result = FEATURES[feature](folder)
            except (Exception, SystemExit) as error:
                result = f"failed: {type(error).__name__}: {error}"
            result = " ".join(result.replace(f"{folder}/", "").split())[:400]
            found.setdefault(name, {})[feature] = result
            out.write_text(json.dumps(found, indent=1) + "\n")
            print(f"{name}, {feature}: {result[:160]}", file=sys.stderr, flush=True)
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", help="default: all")
    parser.add_argument("--features", nargs="+", default=list(FEATURES), choices=list(FEATURES))
    parser.add_argument("--part", default="1/1", help="K/N: the K-th of N parts of the list")
    args = parser.parse_args()
    part, count = map(int, args.part.split("/"))
    record((args.names or list(architectures.CASES))[part - 1 :: count], args.features, args.out)


if __name__ == "__main__":
    main()
