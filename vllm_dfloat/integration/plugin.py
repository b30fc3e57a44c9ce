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

    from vllm_dfloat.integration import autodetect, front_end
    from vllm_dfloat.integration.compiling import cuda_graphs
    from vllm_dfloat.integration.config import DFloat11Config
    from vllm_dfloat.integration.seam import compat

    if METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(METHOD)(DFloat11Config)
        compat.warn_if_untested_version()
    _warn_if_replaced(DFloat11Config)
    autodetect.install()
    front_end.install()
    cuda_graphs.install()
    compat.let_numba_be_scanned()


def _warn_if_replaced(own: type) -> None:
    """Log one line if another plugin has registered the name, which then stands for what that plugin does."""
    from vllm.model_executor.layers import quantization

    registered = getattr(quantization, "_CUSTOMIZED_METHOD_TO_QUANT_CONFIG", {}).get(METHOD, own)
    if registered is not own:
        logger.warning(
            "dfloat11: another plugin has registered this name, %s.%s, so --quantization dfloat11 is that plugin's; "
            "uninstall one of the two, or list in VLLM_PLUGINS the plugins to load",
            registered.__module__,
            registered.__qualname__,
        )
