"""How many rows of activations vLLM multiplies by an LM head at once."""

from typing import Any

PROMPT_ROWS_OF_V2 = 1024  # CHUNK_SIZE of vllm/v1/worker/gpu/sample/prompt_logprob.py, 0.28 to 0.33


def most_sampled(config: Any) -> int:
    """Return the most rows that are sampled from in one step: of each request one, and one per speculated token."""
    scheduler = config.scheduler_config
    speculative = getattr(config, "speculative_config", None)
    tokens = int(getattr(speculative, "num_speculative_tokens", None) or 0)
    return min(int(scheduler.max_num_seqs) * (1 + tokens), _batched(config))


def most(config: Any) -> int:
    """Return the most rows that occur at all: sampled ones, or those of a prompt whose log-probabilities are wanted."""
    of_prompt = _batched(config)
    if getattr(config, "use_v2_model_runner", False):
        of_prompt = min(of_prompt, PROMPT_ROWS_OF_V2)
    return max(most_sampled(config), of_prompt)


def captures_heads(config: Any) -> bool:
    """Return whether products with an LM head may be captured in CUDA graphs: those of some draft models are."""
    return getattr(config, "speculative_config", None) is not None


def _batched(config: Any) -> int:
    scheduler = config.scheduler_config
    return max(int(scheduler.max_num_batched_tokens), int(scheduler.max_num_seqs))


def in_order(most_sampled: int, most: int) -> list[int]:
    """Return 1 to `most`: what occurs in most steps first, namely the usual sizes of CUDA graphs among the sampled."""
    usual = [m for m in (1, 2, 4, *range(8, most_sampled + 1, 8)) if m <= most_sampled]
    known = set(usual)
    return usual + [m for m in range(1, most + 1) if m not in known]
