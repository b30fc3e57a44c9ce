"""What users ask of an engine besides a greedy answer; each returns all that vLLM says, for exact comparison."""

from collections.abc import Callable
from typing import Any

import torch
from engines import PROMPTS, SETTINGS, values

SHARED = [
    [(11 * i) % 250 + 3 for i in range(96)] + [k] for k in (5, 6)
]  # three whole blocks, then different ends
# One engine for all of these: prompts are prefilled in pieces of 64 tokens, and a prompt's blocks are kept. Requests
# with a seed are short: on a CPU, BF16 vLLM itself fails when such a prompt is prefilled in pieces.
ENGINE: dict[str, Any] = {
    **SETTINGS,
    "skip_tokenizer_init": False,
    "enable_prefix_caching": True,
    "enable_chunked_prefill": True,
    "max_num_batched_tokens": 64,
    "block_size": 32,
    "enable_prompt_embeds": True,
}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "age": {"type": "integer", "maximum": 9}},
    "required": ["name", "age"],
}  # fmt: skip


def generate(llm: Any, prompts: list[Any], **how: Any) -> list[Any]:
    """Return, of every answer, its tokens, its text, all log-probabilities, and how many tokens were cached."""
    from vllm import SamplingParams

    how = {"max_tokens": 6, "logprobs": -1, **how}
    outputs = llm.generate(prompts, SamplingParams(**how), use_tqdm=False)
    return [
        (
            list(answer.token_ids),
            answer.text,
            answer.finish_reason,
            [values(at) for at in answer.logprobs or ()],
            output.num_cached_tokens,
        )
        for output in outputs
        for answer in output.outputs
    ]


def tokens(prompts: list[list[int]]) -> list[Any]:
    return [{"prompt_token_ids": prompt} for prompt in prompts]


def beam_search(llm: Any) -> Any:
    from vllm.sampling_params import BeamSearchParams

    found = llm.beam_search(tokens(PROMPTS), BeamSearchParams(beam_width=3, max_tokens=6))
    return [[(beam.tokens, beam.cum_logprob) for beam in output.sequences] for output in found]


def several_answers(llm: Any) -> Any:
    return generate(llm, tokens(PROMPTS[:1]), n=3, temperature=0.8, seed=5)


def engines_seed(llm: Any) -> Any:
    """Sample with the seed of the engine: equal only if nothing else draws random numbers."""
    return generate(llm, tokens(PROMPTS), temperature=1.0)


def prefix_caching(llm: Any) -> Any:
    """Prefill the same three blocks twice; the second time they come from the cache."""
    llm.reset_prefix_cache()
    found = [generate(llm, tokens([prompt]), temperature=0)[0] for prompt in SHARED]
    assert [cached for *_, cached in found] == [0, 96]
    return found


def structured_output(llm: Any) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    kinds: list[dict[str, Any]] = [
        {"json": SCHEMA},
        {"regex": "[a-c]{3}"},
        {"choice": ["yes", "no"]},
    ]
    return [
        generate(llm, [text], temperature=0, max_tokens=24, structured_outputs=StructuredOutputsParams(**kind))
        for kind in kinds
        for text in ("Return the ",)
    ]  # fmt: skip


def prompt_embeddings(llm: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    embeds = torch.randn(7, 256, generator=generator).mul_(0.02).bfloat16()
    return generate(llm, [{"prompt_embeds": embeds}], temperature=0)


def penalties_and_cuts(llm: Any) -> Any:
    how: dict[str, Any] = dict(
        temperature=0.7, top_p=0.9, top_k=20, min_p=0.01, seed=1, presence_penalty=0.5, frequency_penalty=0.5,
        repetition_penalty=1.1, logit_bias={7: 2.0}, min_tokens=3, prompt_logprobs=3,
    )  # fmt: skip
    return generate(llm, tokens(PROMPTS), **how)


def chat(llm: Any) -> Any:
    from vllm import SamplingParams

    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    asked = [{"role": "user", "content": "Return the"}]
    output, *_ = llm.chat(
        asked, SamplingParams(temperature=0, max_tokens=6, logprobs=5), use_tqdm=False, chat_template=template
    )  # fmt: skip
    return output.outputs[0].text, [values(at) for at in output.outputs[0].logprobs]


FEATURES: dict[str, Callable[[Any], Any]] = {
    "beam search": beam_search,
    "n": several_answers,
    "the engine's seed": engines_seed,
    "prefix caching, chunked prefill": prefix_caching,
    "structured output": structured_output,
    "prompt embeddings": prompt_embeddings,
    "penalties and cuts": penalties_and_cuts,
    "chat": chat,
}
