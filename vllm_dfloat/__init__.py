"""Serve LLMs in vLLM from losslessly compressed BF16 weights (DFloat11)."""

__version__ = "0.1.0"
