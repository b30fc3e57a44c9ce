"""Names that vLLM and users know the plugin by."""

import logging

METHOD = "dfloat11"  # what users pass as --quantization

# vLLM configures only the loggers below its own name; under another name INFO lines would be lost.
logger = logging.getLogger("vllm.dfloat11")
