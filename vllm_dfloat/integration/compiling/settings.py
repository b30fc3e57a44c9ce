"""Settings for models compiled for a GPU, so that they give the answers of compiled BF16 vLLM.

Some settings are made here; for others a warning tells the user what to change. docs/exactness.md gives the reasons. On
a CPU nothing is needed: Inductor does not time kernels there, and vLLM's GEMMs are opaque to it.
"""

from collections.abc import Mapping
from typing import Any

import torch

from vllm_dfloat.integration.compiling import additions
from vllm_dfloat.integration.seam import compat
from vllm_dfloat.integration.seam.names import logger

HELD = "dfloat11_layouts"  # the entry of vLLM's additional_config that `note_layouts` makes
# In these modes Inductor replaces the matmuls that it sees; it does not see those of compressed layers.
OWN_GEMMS = ("max_autotune", "max_autotune_gemm", "coordinate_descent_tuning")
ADVICE = '--compilation-config \'{"inductor_compile_config": {"deterministic": true, "combo_kernels": false}}\''


def prepare(config: Any) -> None:
    """Prepare Inductor for compressed layers; log in one line the settings that can make answers differ from BF16."""
    if not compat.is_compiled_for_gpu(config):
        return
    additions.install()
    if found := differences(config.compilation_config):
        logger.warning(
            "dfloat11: compiled answers may part from those of compiled BF16 vLLM in the last bits: %s. "
            "See docs/exactness.md; --enforce-eager for both needs nothing of this",
            "; ".join(found),
        )


def note_layouts(config: Any, model: torch.nn.Module) -> None:
    """After loading: let vLLM's compile cache tell models apart in which other layers have another layout.

    A compiled graph names each layer's layout, and that depends on values where a matrix would not have shrunk, and on
    the GPU's memory with "auto". The cache hashes options, and no weights.
    """
    methods: list[Any] = [getattr(layer, "quant_method", None) for layer in model.modules()]
    # A draft may be compressed where its target is not: then every layer is another.
    asked = getattr(getattr(config.quant_config, "options", None), "layout", None)
    held = {
        method.name: method.layout
        for method in methods
        if getattr(method, "layout", asked) != asked
    }
    if not held:
        return
    # A model compiles with the config that it was built with, which may be a copy.
    configs = [config, *(getattr(layer, "vllm_config", None) for layer in model.modules())]
    for one in {id(one): one for one in configs if one is not None}.values():
        if isinstance(one.additional_config, dict):
            one.additional_config = {**one.additional_config, HELD: held}


def differences(compilation: Any) -> list[str]:
    """Return the settings of a CompilationConfig that can make compiled BF16 vLLM's answers differ, with remedies."""
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
