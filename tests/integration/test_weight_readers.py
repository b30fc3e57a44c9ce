"""Which embeddings have their BF16 values read by a model's own code: real classes of vLLM, and odd ones."""

import importlib
import sys
import types
from pathlib import Path

import pytest
import torch

from vllm_dfloat.integration.seam import weight_readers


@pytest.mark.parametrize(
    ("module", "name", "is_read"),
    [
        ("gemma2", "Gemma2ForCausalLM", False),
        ("gemma2", "Gemma2Model", False),
        ("commandr", "CohereForCausalLM", False),
        ("bert", "BertEmbedding", False),
        ("bert", "BertModel", False),
        (
            "diffusion_gemma",
            "DiffusionGemmaForConditionalGeneration",
            True,
        ),  # a helper's class beside it does
        ("bert", "BertForMaskedLM", True),  # copies the word embedding into its decoder
    ],
)
def test_real_classes_are_told_apart(module: str, name: str, is_read: bool) -> None:
    try:
        cls = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), name, None)
    except ImportError:
        cls = None
    if cls is None:
        pytest.skip(f"this vLLM has no {name}")
    found = weight_readers._of_class(cls)
    assert bool(found & {"embed_tokens", "word_embeddings", "lm_head", "*"}) == is_read


CODE = """
import torch.nn.functional as F
class Model:
    def __init__(self):
        self.lm_head.weight = self.model.embed_tokens.weight
    def forward(self, x):
        {line}
"""


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("return F.linear(x, self.model.embed_tokens.weight)", {"embed_tokens"}),
        ("return x.to(self.model.embed_tokens.weight.dtype)", set()),
        ("return self.embed_tokens.weight.shape[0]", set()),
        ("table = self.wte; return F.embedding(x, table.weight)", {"table", "wte"}),
        ("return self.embeds[0].weight[x]", {"embeds"}),
        ("return getattr(self, 'lm_head').weight @ x", {"lm_head"}),
        ("return self.get_input_embeddings().weight @ x", {"*"}),
        ("return isinstance(self.head.weight, int)", set()),
        ("self.embed_tokens.weight.data.copy_(x)", {"embed_tokens"}),
    ],
)
def test_each_way_to_read_a_weight_is_found(
    line: str, expected: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "odd_model.py").write_text(CODE.format(line=line))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "odd_model", raising=False)
    weight_readers._of_class.cache_clear()
    weight_readers._parsed.cache_clear()
    importlib.invalidate_caches()
    assert weight_readers._of_class(importlib.import_module("odd_model").Model) == expected


def test_code_without_source_may_read_every_weight() -> None:
    made = types.new_class("Made", (torch.nn.Module,))
    made.__module__ = "nowhere"
    assert weight_readers.names_read(made()) == {weight_readers.UNREADABLE}
    assert weight_readers.is_read(torch.nn.Linear(1, 1), "a.b", frozenset("*"))
