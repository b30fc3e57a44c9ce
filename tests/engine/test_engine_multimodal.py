"""Models that see or hear: for images and sounds, tokens and all logprobs of BF16 vLLM, from both kinds of files."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import multimodal_models
import pytest
from engines import engine, values

from vllm_dfloat.convert.compress import compress
from vllm_dfloat.convert.source import open_source

pytestmark = pytest.mark.engine

SEES = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="needs torchvision, as vLLM does for it"
)
HEARS = {"WhisperForConditionalGeneration", "Qwen2AudioForConditionalGeneration"}
NAMES = [
    "WhisperForConditionalGeneration",
    pytest.param("Qwen2AudioForConditionalGeneration", marks=pytest.mark.on_demand),
    *(pytest.param(n, marks=SEES) for n in multimodal_models.MODELS if n not in HEARS),
]


def answers(model: Path, requests: list[Any], **settings: Any) -> list[Any]:
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=8, logprobs=-1, ignore_eos=True, detokenize=False
    )
    length = 128 if "Whisper" in model.parent.name else 512
    settings |= dict(skip_tokenizer_init=False, max_model_len=length)
    with engine(model, **settings) as llm:
        outputs = [output.outputs[0] for output in llm.generate(requests, sampling, use_tqdm=False)]
    return [
        (list(output.token_ids), [values(position) for position in output.logprobs])
        for output in outputs
    ]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_seen_or_heard_is_answered_as_by_bf16_vllm(
    name: str, tmp_path: Path, log_lines: list[str]
) -> None:
    # Bug caught: Whisper, whose embedding is torch's own, died when it was built.
    model = tmp_path / name / "m"
    requests = multimodal_models.MODELS[name](model)
    expected = answers(model, requests)
    assert expected[0] != expected[1]  # the tower has been listened to
    assert answers(model, requests, quantization="dfloat11") == expected
    compress(open_source(model), tmp_path / name / "df11", workers=1)
    assert answers(tmp_path / name / "df11", requests) == expected
    lines = [line for line in log_lines if re.search(r"; not compressed: .*conv1 \d+ bytes", line)]
    assert len(lines) == 2 * (name in HEARS)  # convolutions stay BF16 and are named
