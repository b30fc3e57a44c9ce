"""What engines that are forks share: vLLM, imported before there is any CUDA context."""

import contextlib

with contextlib.suppress(Exception):  # an engine that cannot import it says so itself
    from vllm import LLM as LLM
