"""Under VLLM_BATCH_INVARIANT, leave out torch.compile where BF16 vLLM does.

There vLLM 0.32 and later multiply large models of BF16 by a GEMM whose tiles depend on the number of rows, and take
CUDA graphs without torch.compile for it. They do so for unquantized models only. A compressed one gives the same bits
only if what lies between its matrices is computed by the same kernels.
"""

from typing import Any

from vllm_dfloat.integration.seam.names import METHOD

_DECISION = "_uses_breakable_cudagraph_for_batch_invariance"


def install() -> None:
    """Make vLLM decide for compressed models as for unquantized ones. A second call changes nothing."""
    from vllm.config import VllmConfig

    decide = getattr(VllmConfig, _DECISION, None)
    if decide is None or getattr(decide, "knows_dfloat11", False):
        return

    def as_for_bf16(self: Any) -> bool:
        model = self.model_config
        if getattr(model, "quantization", None) == METHOD:
            self = _Changed(self, model_config=_Changed(model, quantization=None))
        return bool(decide(self))

    as_for_bf16.knows_dfloat11 = True  # type: ignore[attr-defined]
    setattr(VllmConfig, _DECISION, as_for_bf16)


class _Changed:
    """A view of an object in which some attributes are others."""

    def __init__(self, of: Any, **changes: Any) -> None:
        self.__dict__.update(_of=of, **changes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_of"], name)
