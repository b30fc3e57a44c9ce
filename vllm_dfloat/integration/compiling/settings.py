"""Models compiled for a GPU: what we do, and what only the user can, to have the answers of compiled BF16 vLLM.

docs/exactness.md says why. On a CPU nothing is needed: Inductor times nothing there, and vLLM's GEMMs are opaque to it.
"""

from collections.abc import Mapping
from typing import Any

from vllm_dfloat.integration.compiling import additions
from vllm_dfloat.integration.seam import compat
from vllm_dfloat.integration.seam.names import logger

# What Inductor does in these modes to the matmuls that it sees, it cannot do to compressed layers.
OWN_GEMMS = ("max_autotune", "max_autotune_gemm", "coordinate_descent_tuning")
ADVICE = '--compilation-config \'{"inductor_compile_config": {"deterministic": true, "combo_kernels": false}}\''


def prepare(config: Any) -> None:
    """Prepare Inductor for compressed layers, and log in one line what may part the answers from BF16 vLLM's."""
    if not compat.is_compiled_for_gpu(config):
        return
    additions.install()
    if found := differences(config.compilation_config):
        logger.warning(
            "dfloat11: compiled answers may part from those of compiled BF16 vLLM in the last bits: %s. "
            "See docs/exactness.md; --enforce-eager for both needs nothing of this",
            "; ".join(found),
        )


def differences(compilation: Any) -> list[str]:
    """Return what in vLLM's CompilationConfig lets compiled BF16 vLLM answer otherwise, each with its remedy."""
    options: Mapping[str, Any] = compilation.inductor_compile_config
    found = []
    if compat.inductor_times_kernels(options):
        found.append(
            "Inductor chooses kernels by timing them, and BF16 vLLM may part from itself after a restart (give both "
            f"{ADVICE})"
        )
    given = [name for name in OWN_GEMMS if options.get(name)]
    if given:
        found.append(f"{', '.join(given)}: other GEMMs for BF16 (leave it out)")
    if compilation.compile_sizes and compat.tunes_single_sizes():
        found.append(
            "compile_sizes: other GEMMs for BF16 in these sizes (leave it out, or set "
            "VLLM_ENABLE_INDUCTOR_MAX_AUTOTUNE=0 and VLLM_ENABLE_INDUCTOR_COORDINATE_DESCENT_TUNING=0)"
        )
    if getattr(compilation.pass_config, "fuse_gemm_comms", False):
        found.append("fuse_gemm_comms: BF16's GEMMs are cut in pieces (leave it out)")
    if not compat.inductor_keeps_biases(options):
        found.append(
            "this Inductor takes biases out of BF16's GEMMs and rounds twice (PyTorch 2.12 and later leave them in)"
        )
    return found
