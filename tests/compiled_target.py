"""For which GPU this run's kernels are compiled, if it does not interpret them: pytest -p ptx_plugin."""

import os

import pytest

# 90 for sm_90; None where Triton interprets.
TARGET = int(os.environ.get("VLLM_DFLOAT_PTX", "0")) or None
interpreted_only = pytest.mark.skipif(
    TARGET is not None, reason="is about Triton's interpreter; the kernels are compiled here"
)
