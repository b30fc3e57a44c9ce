"""The entry point `vllm.general_plugins`: vLLM calls `register` in every process it starts."""

from vllm_dfloat.integration.seam.names import METHOD, logger


def register() -> None:
    """Register `--quantization dfloat11` with vLLM, and let vLLM recognise official checkpoints.

    vLLM calls this in every run on the machine, also in runs that do not use the plugin, and an exception would end
    the run. So it does little, may be called again, and logs a failure in one line.
    """
    try:
        _register()
    except Exception as error:
        logger.warning(
            "dfloat11: could not register with vLLM (%s: %s); --quantization dfloat11 will be unknown",
            type(error).__name__,
            error,
        )


def _register() -> None:
    from vllm.model_executor.layers.quantization import (
        QUANTIZATION_METHODS,
        register_quantization_config,
    )

    from vllm_dfloat.integration import autodetect, unfinished
    from vllm_dfloat.integration.config import DFloat11Config
    from vllm_dfloat.integration.seam import compat

    if METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(METHOD)(DFloat11Config)
        compat.warn_if_untested_version()
    autodetect.install()
    unfinished.install()
    compat.let_numba_be_scanned()
