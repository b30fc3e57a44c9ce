"""Pairs of engines of several ranks, BF16 and compressed, with the same settings, in a separate process."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engines
import tiny_models
from conftest import Checkpoint
from engines import Answers, answers_elsewhere

ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several ranks on one NUMA node
    "OMP_NUM_THREADS": "1",  # ranks that share cores and spin would take twice the time
}
OFFICIAL = {"qwen3-tiny-tied", "llama-tiny", "phi3-tiny-fused"}
# The same as VLLM_CPU_CI_ENV makes of vLLM's default for a CPU: Dynamo traces, without Inductor's C++ compiles. But
# with this setting vLLM still warms up; without, pipeline stages have no receive buffer (see engines.py).
TRACED = dict(compilation_config={"mode": 2, "backend": "eager", "custom_ops": ["none"]})
WORKER = re.compile(r"\((Worker\w*) pid=\d+\) [^(]*dfloat11: compressed")  # named after its ranks


@dataclass(frozen=True)
class Case:
    """A model (an architecture, an official vector or "shipped"), a mode and how many ranks run it.

    With "-offload" after the mode, a part of each rank's weights is in host memory (on CPUs BF16 vLLM ignores that).
    """

    model: str
    mode: str
    tp: int = 1
    pp: int = 1

    def __str__(self) -> str:
        return f"{self.model}-{self.mode}-tp{self.tp}-pp{self.pp}"

    def settings(self) -> dict[str, Any]:
        how = (
            dict(enforce_eager=True)
            if self.mode.startswith("eager")
            else dict(enforce_eager=False, **TRACED)
        )
        if self.mode.endswith("-offload"):
            how["cpu_offload_gb"] = 0.0008
        return dict(tensor_parallel_size=self.tp, pipeline_parallel_size=self.pp, **how)


def answer_pairs(
    cases: list[Case],
    bf16_checkpoint: Checkpoint,
    folder: Path,
    environment: dict[str, str] = ENVIRONMENT,
    script: str = engines.__file__,
    forks: bool = False,
) -> dict[Case, tuple[Answers, Answers]]:
    """Return the answers of the compressed and of the BF16 engine in each case; check the log line of every rank.

    All engines run in one process, so that vLLM is imported only once. With `forks` that holds for their ranks too,
    but for those of the first compressed engine, which are started as vLLM does on CPUs.
    """
    runs: list[dict[str, Any]] = []
    for case in cases:
        name, given = case.model, case.settings()
        plain = tiny_models.SHIPPED if name == "shipped" else bf16_checkpoint(name)
        if name in OFFICIAL:
            runs.append(dict(model=str(tiny_models.official(name)), **given))
        else:
            runs.append(dict(model=str(plain), quantization="dfloat11", **given))
        runs.append(dict(model=str(plain), **given))
    for run in runs[1:] if forks else ():
        run["forks"] = True
    num_ranks = sum(2 * case.tp * case.pp for case in cases)
    results = answers_elsewhere(runs, folder, environment, 120 * num_ranks, script)
    assert_each_rank_compressed(folder / "log.txt", cases)
    return dict(zip(cases, zip(results[::2], results[1::2], strict=True), strict=True))


def assert_each_rank_compressed(log: Path, cases: list[Case]) -> None:
    """Check that each rank of each compressed engine has logged its line once."""
    found = Counter(WORKER.findall(log.read_text()))
    expected = Counter(name for case in cases for name in names_of_ranks(case))
    assert found == expected


def names_of_ranks(case: Case) -> list[str]:
    stages = [f"_PP{stage}" for stage in range(case.pp)] if case.pp > 1 else [""]
    slices = [f"_TP{rank}" for rank in range(case.tp)] if case.tp > 1 else [""]
    return [f"Worker{stage}{rank}" for stage in stages for rank in slices]
