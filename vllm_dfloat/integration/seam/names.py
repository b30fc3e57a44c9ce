"""The plugin's names in vLLM: of the quantization method and of the logger."""

import logging

METHOD = "dfloat11"  # what users pass as --quantization

ASKED = "dfloat11_asked"  # the attribute of embeddings and LM heads about which the quantization config was asked

# vLLM configures only loggers below its own name; INFO lines of another logger would be lost.
logger = logging.getLogger("vllm.dfloat11")
