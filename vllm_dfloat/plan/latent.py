"""Multi-head latent attention (DeepSeek): keys and values are read from one small vector per token, and so cached."""

from collections.abc import Iterator

from vllm_dfloat.plan.build import Spot, linear, norm
from vllm_dfloat.plan.config import ModelConfig
from vllm_dfloat.plan.weights import Part, Weight


def latent_attention(config: ModelConfig, at: Spot, prefix: str) -> Iterator[Weight]:
    """Yield the weights of one layer's attention; what makes the latent vector is whole on every rank."""
    rank, rope = config.size("kv_lora_rank"), config.size("qk_rope_head_dim")
    nope, value = config.size("qk_nope_head_dim"), config.size("v_head_dim")
    heads, hidden = config.heads, config.hidden
    queries = Part(heads * (nope + rope), heads)
    if q_rank := config.count("q_lora_rank"):
        yield from linear(
            at, f"{prefix}.fused_qkv_a_proj", (Part(q_rank), Part(rank + rope)), hidden, "none",
            tensors={"q_a_proj": q_rank, "kv_a_proj_with_mqa": rank + rope},
        )  # fmt: skip
        yield from norm(at, f"{prefix}.q_a_layernorm", q_rank)
        yield from linear(at, f"{prefix}.q_b_proj", queries, q_rank, "rows")
    else:
        yield from linear(at, f"{prefix}.q_proj", queries, hidden, "rows")
        yield from linear(at, f"{prefix}.kv_a_proj_with_mqa", Part(rank + rope), hidden, "none")
    yield from norm(at, f"{prefix}.kv_a_layernorm", rank)
    # vLLM reads it as one matrix for keys and one for values, for tokens that are decoded one by one.
    yield from linear(
        at, f"{prefix}.kv_b_proj", Part(heads * (nope + value), heads), rank, "rows", is_compressed=False
    )  # fmt: skip
    yield from linear(at, f"{prefix}.o_proj", Part(hidden), heads * value, "cols")
