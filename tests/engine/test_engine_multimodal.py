"""Models that see or hear: for images and sounds, tokens and all logprobs of BF16 vLLM, from both kinds of files."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import encoder_decoders
import multimodal_models
import pytest
from engines import engine, values

from vllm_dfloat.convert.compress import compress
from vllm_dfloat.convert.source import open_source

pytestmark = pytest.mark.engine

SEES = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="needs torchvision, as vLLM does for it"
)
MODELS = {**multimodal_models.MODELS, **encoder_decoders.MODELS}
ON_DEMAND = ("Qwen2AudioForConditionalGeneration", *encoder_decoders.MODELS)
ANYWHERE = {"WhisperForConditionalGeneration", *ON_DEMAND}  # without torchvision
NAMES = [
    "WhisperForConditionalGeneration",
    *(pytest.param(n, marks=pytest.mark.on_demand) for n in ON_DEMAND),
    *(pytest.param(n, marks=SEES) for n in MODELS if n not in ANYWHERE),
]
KEPT = {  # what is named as not compressed
    "WhisperForConditionalGeneration": "conv1",
    "Qwen2AudioForConditionalGeneration": "conv1",
    "CohereAsrForConditionalGeneration": "token_embedding",
    "NemotronParseForConditionalGeneration": "conv2",
}


def answers(model: Path, requests: list[Any], **settings: Any) -> list[Any]:
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=8, logprobs=-1, ignore_eos=True, detokenize=False
    )
    is_short = any(name in model.parent.name for name in ("Whisper", "CohereAsr", "NemotronParse"))
    settings |= dict(skip_tokenizer_init=False, max_model_len=128 if is_short else 512)
    if "NemotronParse" in model.parent.name:  # its config and processor are code beside the weights
        settings["trust_remote_code"] = True
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
    requests = MODELS[name](model)
    expected = answers(model, requests)
    assert expected[0] != expected[1]  # the tower has been listened to
    assert answers(model, requests, quantization="dfloat11") == expected
    compress(open_source(model), tmp_path / name / "df11", workers=1)
    assert answers(tmp_path / name / "df11", requests) == expected
    if name in KEPT:  # it stays BF16 and is named
        kept = re.compile(rf"; not compressed: .*{KEPT[name]} \d+ bytes")
        assert len([line for line in log_lines if kept.search(line)]) == 2
