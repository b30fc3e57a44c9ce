"""How a model is to be served: what `plan` is asked about."""

from dataclasses import dataclass

from vllm_dfloat.plan.byte_sizes import GIB
from vllm_dfloat.plan.offload import NO_PREFETCH, Prefetch

MODES = (
    "exact",
    "fused",
    "fused-exact",
)  # the first decodes all; the others multiply few rows without
LARGE_GPU = 70 * GIB  # from here on vLLM takes larger batches by default


@dataclass(frozen=True)
class Settings:
    """How the model is to be served; names and defaults are vLLM's.

    Attributes:
        gpu_memory: bytes of each GPU.
        max_model_len: tokens; None for the model's context.
        block_size: tokens per block; None for what vLLM takes on a GPU.
        overhead: bytes beside weights, scratch and KV cache; None to estimate them.
        kv_cache_memory: bytes of KV cache per rank; None for what is left.
        in_flight_batches: batches that are scheduled at once; None for vLLM's choice on a GPU.
        cpu_offload: bytes per GPU that weights may take in host memory (--cpu-offload-gb); 0 for none.
        prefetch: prefetching offload (--offload-group-size and its like), which goes before `cpu_offload`.
        dp: data-parallel ranks, engines with weights and a KV cache of their own that share the routed experts.
        expert_parallel: whether ranks share experts whole (--enable-expert-parallel), not each of them in parts.
        prefix_caching: whether prefixes are cached, as by default (--enable-prefix-caching).
        mamba_ssm_cache_dtype: of states; "auto" for what vLLM takes on a GPU.
        layout: how compressed weights are held, of layout_sizes.py, or "auto" (auto.py).
        kv_tokens: that "auto" leaves room for, if one request of --max-model-len takes no more; None for that request.
        mode: of MODES; "auto" goes by it.
        granularity: "layer" or "block", what is decoded in one launch.
        slab: bytes of a slab of the LM head; None for what vLLM takes on a GPU, 0 to hold the whole head.
        slots: scratch buffers in use at the same time; None for as many as the model needs on a GPU.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    gpu_memory: int = 80 * GIB
    gpu_memory_utilization: float = 0.92
    max_model_len: int | None = None
    kv_cache_dtype: str = "auto"
    block_size: int | None = None
    max_num_batched_tokens: int | None = None
    max_num_seqs: int | None = None
    in_flight_batches: int | None = None
    overhead: int | None = None
    kv_cache_memory: int | None = None
    cpu_offload: int = 0
    prefetch: Prefetch = NO_PREFETCH
    expert_parallel: bool = False
    prefix_caching: bool = True
    mamba_ssm_cache_dtype: str = "auto"
    layout: str = "packed"
    kv_tokens: int | None = None
    mode: str = MODES[0]
    granularity: str = "layer"
    slab: int | None = None
    slots: int | None = None

    @property
    def ranks(self) -> str:
        """How the GPUs share the model, in words."""
        engines = f" x DP {self.dp}" if self.dp > 1 else ""
        return f"TP {self.tp} x PP {self.pp}{engines}"

    @property
    def decodes_all(self) -> bool:
        return self.mode == MODES[0]

    @property
    def requested(self) -> int:
        """Bytes per GPU that vLLM may use."""
        return int(self.gpu_memory * self.gpu_memory_utilization)

    def tokens_of_auto(self, context: int) -> int:
        """Return the tokens of KV cache that "auto" leaves room for: vLLM does not start without those of one request.

        Args:
            context: of the model, in tokens.
        """
        return max(self.kv_tokens or 0, self.max_model_len or 0) or context

    @property
    def batched_tokens(self) -> int:
        large = self.gpu_memory >= LARGE_GPU
        return self.max_num_batched_tokens or (8192 if large else 2048)

    @property
    def num_seqs(self) -> int:
        return self.max_num_seqs or (1024 if self.gpu_memory >= LARGE_GPU else 256)

    @property
    def batches(self) -> int:
        return self.in_flight_batches or (2 if self.pp == 1 else self.pp)
