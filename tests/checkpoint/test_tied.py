"""Whether an LM head is tied to the embedding: the entries of a config, and which of them decides."""

from pathlib import Path
from typing import Any

import pytest

from vllm_dfloat.checkpoint.completeness import refuse_gaps
from vllm_dfloat.checkpoint.patterns import compile_patterns
from vllm_dfloat.checkpoint.tied import ties_embeddings
from vllm_dfloat.errors import FormatError

YES, NO = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        (YES, True),
        (NO, False),
        ({"text_config": YES}, True),
        ({"text_config": NO}, False),
        ({"text_config": YES, **NO}, False),
        ({"text_config": NO, **YES}, True),
        ({"text_config": "none"}, None),
        ({"text_config": YES, "tie_word_embeddings": None}, None),
        ({"tie_word_embeddings": "yes"}, None),
    ],
)
def test_what_the_whole_config_says_goes_before_its_text_config(
    config: dict[str, Any], expected: bool | None
) -> None:
    # As in vLLM's VllmConfig.with_hf_config.
    assert ties_embeddings(config) is expected


@pytest.mark.parametrize(("whole", "text", "is_refused"), [(NO, YES, True), (YES, NO, False)])
def test_a_missing_head_is_missed_where_vllm_would_look_for_one(
    whole: dict[str, Any], text: dict[str, Any], is_refused: bool, tmp_path: Path
) -> None:
    # Bug caught: either part of the config could tie the two, though vLLM gives precedence to the whole config.
    config = {
        "architectures": ["SomeForConditionalGeneration"],
        "text_config": {"num_hidden_layers": 1, **text},
        **whole,
    }
    names = ["model.layers.0.a.weight", "model.embed_tokens.weight"]
    patterns = compile_patterns({}, "config.json")
    if not is_refused:
        return refuse_gaps(tmp_path, config, patterns, names)
    with pytest.raises(FormatError, match="no tensor of an LM head"):
        refuse_gaps(tmp_path, config, patterns, names)
