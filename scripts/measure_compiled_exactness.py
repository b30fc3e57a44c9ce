"""Whether torch.compile gives the same answers twice: BF16 vLLM against itself, and compressed weights against BF16.

    python scripts/measure_compiled_exactness.py [--models llama,qwen2] [--shape small] [--quick] [--json FILE]
    python scripts/measure_compiled_exactness.py --model PATH [--json FILE]

Every run is a vLLM engine in its own process, with its own cache folders for vLLM, Inductor and Triton, or with those
that another run has filled. All greedy tokens and all log-probabilities, of prompts and of answers, are compared to the
last bit. Random models are written to a temporary folder. Exit status: 0 if compressed weights always gave the answers
of BF16 vLLM in the same mode, 1 if not, 2 if something could not run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
ENGINE = ROOT / "scripts/bench/compiled/engine.py"
sys.path.insert(0, str(ROOT / "tests"))  # for tiny_models.py, which knows the architectures

SHAPES: dict[str, dict[str, int]] = {
    "small": {},  # that of tests/tiny_models.py: hidden size 256
    "large": dict(  # weights of 2 to 11 MiB
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=3,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=1000,
    ),
}
DEFAULT_MODELS = "llama,qwen2,qwen3,phi3,gemma3,mistral,shipped"
TIMEOUT = 1800  # seconds per engine


@dataclass(frozen=True)
class Run:
    """One engine.

    Attributes:
        name: for tables.
        ours: whether weights are compressed; else BF16.
        mode: "compiled", "deterministic" (compiled, with Inductor's deterministic mode) or "eager".
        cache: name of the folder of caches; runs with the same name share it.
    """

    name: str
    ours: bool
    mode: str
    cache: str

    def settings(self) -> dict[str, Any]:
        given: dict[str, Any] = dict(quantization="dfloat11") if self.ours else {}
        given["enforce_eager"] = self.mode == "eager"
        if self.mode == "deterministic":
            options = {"deterministic": True, "combo_kernels": False}  # as docs/exactness.md says
            given["compilation_config"] = {"inductor_compile_config": options}
        return given


RUNS = [
    Run("bf16", False, "compiled", "a"),
    Run("bf16, again", False, "compiled", "b"),
    Run("bf16, cache of the first", False, "compiled", "a"),
    Run("dfloat11", True, "compiled", "c"),
    Run("dfloat11, again", True, "compiled", "d"),
    Run("dfloat11, cache of bf16", True, "compiled", "a"),
    Run("bf16, deterministic", False, "deterministic", "e"),
    Run("dfloat11, deterministic", True, "deterministic", "f"),
    Run("bf16, eager", False, "eager", "g"),
    Run("dfloat11, eager", True, "eager", "h"),
]
QUICK = ("bf16", "bf16, again", "dfloat11")
# The pairs of runs that are compared, and whether the plugin promises equal answers.
PAIRS = [
    ("bf16", "bf16, again", False),
    ("bf16", "bf16, cache of the first", False),
    ("bf16", "dfloat11", True),
    ("dfloat11", "dfloat11, again", False),
    ("bf16", "dfloat11, cache of bf16", True),
    ("bf16, deterministic", "dfloat11, deterministic", True),
    ("bf16", "bf16, deterministic", False),
    ("bf16, eager", "dfloat11, eager", True),
    ("bf16, eager", "bf16", False),
]


def run(one: Run, model: Path, folder: Path) -> dict[str, Any]:
    """Run one engine in its own process and return its answers."""
    caches = folder / one.cache
    result = folder / f"{one.name}.npz"
    environment = {
        **os.environ,
        "VLLM_CACHE_ROOT": str(caches / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    environment.pop("VLLM_CPU_CI_ENV", None)  # it would disable Inductor
    log = folder / f"{one.name}.log"
    given = [str(model), json.dumps(one.settings()), str(result)]
    with log.open("wb") as out:
        command = [sys.executable, str(ENGINE), *given]
        status = subprocess.run(
            command, env=environment, stdout=out, stderr=out, timeout=TIMEOUT
        ).returncode
    if status:
        tail = log.read_text(errors="replace")[-3000:]
        raise RuntimeError(f"{one.name}: exit status {status}\n{tail}")
    with np.load(result) as found:
        facts = json.loads(str(found["facts"]))
        return {"tokens": found["tokens"], "logprobs": found["logprobs"], "facts": facts}


def compare(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return how two runs' answers differ. After the first different token, later log-probabilities differ too."""
    a, b = one["logprobs"], other["logprobs"]
    same = np.array_equal(a.view(np.uint64), b.view(np.uint64))
    return {
        "equal": bool(same and np.array_equal(one["tokens"], other["tokens"])),
        "tokens_differing": int((one["tokens"] != other["tokens"]).sum()),
        "logprobs_differing": int((a != b).sum()),
        "logprobs": int(a.size),
        "largest_difference": float(np.abs(a - b).max()),
    }


def measure(model: Path, folder: Path, chosen: list[Run]) -> dict[str, Any]:
    """Run the chosen engines on one model and compare the pairs for which both were run."""
    found = {}
    for one in chosen:
        found[one.name] = run(one, model, folder)
        print(f"  {one.name}: done", file=sys.stderr, flush=True)
    pairs = [
        {"one": one, "other": other, "promised": promised, **compare(found[one], found[other])}
        for one, other, promised in PAIRS
        if one in found and other in found
    ]
    runs = [{**asdict(one), "facts": found[one.name]["facts"]} for one in chosen]
    return {"pairs": pairs, "runs": runs}


def models(args: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield name and folder of each model; make it first if needed."""
    if args.model:
        yield args.model.name, args.model
        return
    import tiny_models

    for name in args.models.split(","):
        if name == "shipped":
            yield "models/tiny", tiny_models.SHIPPED
        else:
            path = folder / name
            yield f"{name}, {args.shape}", tiny_models.save(name, path, **SHAPES[args.shape])


def report(name: str, pairs: list[dict[str, Any]]) -> bool:
    """Print a line per pair; return whether all pairs with promised equality were equal."""
    for pair in pairs:
        count = f"{pair['logprobs_differing']} of {pair['logprobs']} logprobs"
        verdict = "equal" if pair["equal"] else f"DIFFERENT in {count}"
        print(f"{name}: {pair['one']} | {pair['other']}: {verdict}", flush=True)
    return all(pair["equal"] for pair in pairs if pair["promised"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=DEFAULT_MODELS, help=f"default: {DEFAULT_MODELS}")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small")
    parser.add_argument("--model", type=Path, help="folder of a BF16 model, instead of random ones")
    parser.add_argument("--quick", action="store_true", help=f"only the runs {'; '.join(QUICK)}")
    parser.add_argument("--json", type=Path, help="file for the results, added to if it is there")
    args = parser.parse_args()
    chosen = [one for one in RUNS if not args.quick or one.name in QUICK]
    results: dict[str, Any] = {}
    if args.json and args.json.exists():
        results = json.loads(args.json.read_text())
    is_kept = True
    with tempfile.TemporaryDirectory(prefix="exactness-models-") as made:
        for name, path in models(args, Path(made)):
            print(name, file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(prefix="exactness-") as folder:
                try:
                    found = measure(path, Path(folder), chosen)
                except (RuntimeError, subprocess.TimeoutExpired) as trouble:
                    print(f"{name}: {trouble}", file=sys.stderr)
                    return 2
            found["command"] = " ".join(["python", f"scripts/{Path(__file__).name}", *sys.argv[1:]])
            found["date"] = datetime.date.today().isoformat()
            results[name] = found
            is_kept = report(name, found["pairs"]) and is_kept
            if args.json:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if is_kept else 1


if __name__ == "__main__":
    sys.exit(main())
