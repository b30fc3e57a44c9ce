"""Proofs of equal products, kept in vLLM's cache folder: a proof holds for the same device, libraries and shapes.

Each is a JSON file of its own, named by the hash of what it holds for, with a hash of its numbers: one digit that was
changed would be believed otherwise. A file that cannot be read, or that holds anything else, is ignored with a line in
the log, and made anew.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch

from vllm_dfloat.errors import DFloatError
from vllm_dfloat.integration.seam.names import logger
from vllm_dfloat.storage.json_file import read_object

FORMAT = 3
MAX_BYTES = 1 << 20
MAX_COUNT = 1 << 20
_SAVING, _OLD = "saving-", 3600.0  # prefix of a folder that is there during a save; seconds
_LIBRARIES = re.compile(
    r"/(lib(cublas|cublasLt|hipblas|hipblaslt|rocblas|dnnl|mkl\w*|torch_cpu|torch_cuda|torch_hip)|_C)\b[^/]*$"
)
PROCESSOR_FILE = Path("/proc/cpuinfo")
# Its lines that matter. A virtual machine may have the name of a processor, and not its AMX.
_PROCESSOR = re.compile(
    r"(model name|flags|Features|stepping|cache size|CPU (?:implementer|variant|part|revision))\s*:"
)
_VARIABLES = (
    "CUBLAS",
    "NVIDIA_TF32",
    "HIPBLASLT_",
    "ROCBLAS_",
    "TORCH_",
    "PYTORCH_",
    "ONEDNN_",
    "DNNL_",
    "OMP_",
    "MKL_",
    "DISABLE_ADDMM_",
    "VLLM_CPU_",
    "VLLM_ROCM_",
)

Proof = tuple[frozenset[int], frozenset[int]]  # numbers of rows: compared, and of these equal


class Product(Protocol):
    """What is compared with vLLM's product."""

    @property
    def device(self) -> torch.device: ...

    def facts(self) -> dict[str, Any]:
        """Return, as JSON, all that its bits depend on beside the device and the libraries."""


def key_of(product: Product) -> dict[str, Any]:
    """Return all that the bits of a product may depend on but its values, as JSON."""
    import vllm

    device = product.device
    facts: dict[str, Any] = {
        "format": FORMAT,
        **product.facts(),
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "libraries": sorted(_loaded_libraries()),
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)},
    }
    if device.type != "cuda":
        return facts | {"device": _processor(), "threads": torch.get_num_threads()}
    found = torch.cuda.get_device_properties(device)
    matmul = torch.backends.cuda.matmul
    return facts | {
        "device": [found.name, found.major, found.minor, found.multi_processor_count],
        "cuda": torch.version.cuda or f"ROCm {torch.version.hip}",
        "reduced": str(matmul.allow_bf16_reduced_precision_reduction),
        "blas": str(torch.backends.cuda.preferred_blas_library()),
    }


def _loaded_libraries() -> Iterator[list[Any]]:
    """Yield name, size and time of each library of this process that multiplies."""
    with suppress(OSError):
        lines = Path("/proc/self/maps").read_text().splitlines()
        for file in {line[73:] for line in lines if _LIBRARIES.search(line)}:
            status = Path(file).stat()
            yield [file.rpartition("/")[2], status.st_size, int(status.st_mtime)]


def _processor() -> list[str]:
    """Return what GEMMs choose their code by: the processor's lines, and what PyTorch makes of it."""
    lines: set[str] = set()
    with suppress(OSError):
        lines = {line for line in PROCESSOR_FILE.read_text().splitlines() if _PROCESSOR.match(line)}
    return [*sorted(lines), torch.backends.cpu.get_cpu_capability()]


def file_of(key: dict[str, Any]) -> Path:
    """Return the file of the proof for this key."""
    return folder() / f"{_digest(key)}.json"


def _digest(of: Any) -> str:
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:32]


def folder() -> Path:
    """Return the folder of all proofs."""
    from vllm import envs

    return Path(envs.VLLM_CACHE_ROOT) / "dfloat11" / "proofs"


def _is_kept(device: torch.device) -> bool:
    """Return whether the next process will choose the same GEMMs: PyTorch's TunableOp chooses by what it times."""
    return device.type != "cuda" or not torch.cuda.tunable.is_enabled()


def load(product: Product) -> Proof:
    """Return the proof that is kept for a product; an empty one if there is none."""
    if not _is_kept(product.device):
        return frozenset(), frozenset()
    key = key_of(product)
    file = file_of(key)
    try:
        content = read_object(file, MAX_BYTES)
        if content is None:
            return frozenset(), frozenset()
        digest = content.pop("digest", None)
        compared, equal = _counts(content.get("compared")), _counts(content.get("equal"))
        if content.get("key") != json.loads(json.dumps(key)) or not equal <= compared:
            raise ValueError("it is no proof for what its name says")
        if digest != _digest(content):
            raise ValueError("its numbers were changed")
    except (DFloatError, OSError, ValueError) as error:
        logger.warning("dfloat11: %s is ignored and made anew: %s", file, error)
        return frozenset(), frozenset()
    return compared, equal


def save(product: Product, compared: Collection[int], equal: Collection[int]) -> None:
    """Keep a proof; a folder that cannot be written to only costs the next start the time."""
    if not _is_kept(product.device):
        return
    key = key_of(product)
    file = file_of(key)
    content = {"key": key, "compared": _ranges(compared), "equal": _ranges(equal)}
    text = json.dumps({**content, "digest": _digest(content)})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _remove_old(file.parent)
        with tempfile.TemporaryDirectory(prefix=_SAVING, dir=file.parent) as beside:
            Path(beside, file.name).write_text(text)
            os.replace(Path(beside, file.name), file)
    except OSError as error:
        logger.info("dfloat11: %s was not written: %s", file, error)


def _remove_old(proofs: Path) -> None:
    """Remove what saves left behind that were killed; those of other processes that are at work stay."""
    for left in proofs.glob(f"{_SAVING}*"):
        with suppress(OSError):
            if left.stat().st_mtime < time.time() - _OLD:
                shutil.rmtree(left)


def _ranges(counts: Collection[int]) -> list[list[int]]:
    """Return numbers as [first, last] of each run."""
    runs: list[list[int]] = []
    for count in sorted(counts):
        if runs and runs[-1][1] == count - 1:
            runs[-1][1] = count
        else:
            runs.append([count, count])
    return runs


def _counts(runs: Any) -> frozenset[int]:
    """Return the numbers in runs [first, last].

    Raises:
        ValueError: they are anything else.
    """
    if not isinstance(runs, list) or not all(map(_is_run, runs)):
        raise ValueError("it does not hold runs of numbers of rows")
    if sum(last - first for first, last in runs) > MAX_COUNT:
        raise ValueError("it holds more numbers of rows than there are")
    return frozenset(count for first, last in runs for count in range(first, last + 1))


def _is_run(run: Any) -> bool:
    return (
        isinstance(run, list)
        and [type(number) for number in run] == [int, int]
        and 0 < run[0] <= run[1] <= MAX_COUNT
    )
