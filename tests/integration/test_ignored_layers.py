"""With any layer left in BF16, and an LM head that is the embedding, a copy of it or another: BF16 vLLM's answers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from engines import answers, ask, bf16_answers, engine
from model_loads import loaded

from vllm_dfloat.convert.compress import compress
from vllm_dfloat.convert.source import open_source
from vllm_dfloat.integration.layers.method import packed_of
from vllm_dfloat.integration.loading import report
from vllm_dfloat.integration.seam.options import LAYOUTS

pytestmark = pytest.mark.engine

SHAPE = dict(hidden_size=128, intermediate_size=128, num_attention_heads=2)
LINEAR = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
VOCABULARY = ["embed_tokens", "lm_head"]
# How the LM head relates to its embedding; the kind of layer left in BF16; whether the checkpoint is an official one.
ALWAYS = [
    *(("untied", kind, False) for kind in VOCABULARY + LINEAR),
    *(("untied", kind, True) for kind in VOCABULARY),
    ("equal copy", None, True),
    ("equal copy", "lm_head", True),
    ("different", None, False),
    ("different", None, True),
    ("different", "embed_tokens", True),
    ("different unit", None, True),
]
ON_DEMAND = [
    *(("untied", kind, True) for kind in LINEAR),
    *(("tied", kind, is_official) for kind in VOCABULARY for is_official in (False, True)),
    ("equal copy", None, False),
    ("equal copy", "embed_tokens", True),
    ("different", "lm_head", True),
    ("equal unit", None, True),
    *((head, kind, False) for head in ("equal copy", "different") for kind in VOCABULARY),
]
Folders = Callable[[str, bool], Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Return a function: kind of the LM head, whether the folder is compressed -> the folder."""
    root = tmp_path_factory.mktemp("heads")

    def make(head: str, is_official: bool) -> Path:
        plain, official = root / head, root / f"{head}-official"
        if not plain.exists():
            tiny_models.save("qwen3", plain, **SHAPE, tie_word_embeddings=head != "untied")
            tiny_models.edit(plain, lambda tensors: store_head(tensors, head))
            # A separate unit for an LM head that config.json ties: releases of others may have one.
            is_unit = head.endswith("unit")
            source = tie(
                shutil.copytree(plain, root / f"{head}-source"), head != "untied" and not is_unit
            )
            compress(open_source(source), official, workers=1)
            tie(official, head != "untied")
        return official if is_official else plain

    return make


def store_head(tensors: dict[str, torch.Tensor], head: str) -> None:
    embedding = tensors["model.embed_tokens.weight"]
    if head.startswith("equal"):
        tensors["lm_head.weight"] = embedding.clone()
    elif head.startswith("different"):
        tensors["lm_head.weight"] = embedding.flip(0).contiguous()


def tie(folder: Path, is_tied: bool) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": is_tied}))
    return folder


def options(*ignore: str, **others: str) -> dict[str, Any]:
    return dict(
        quantization="dfloat11", additional_config={"dfloat11": {"ignore": list(ignore), **others}}
    )


@pytest.mark.parametrize(
    ("head", "kind", "is_official"),
    [*ALWAYS, *(pytest.param(*case, marks=pytest.mark.on_demand) for case in ON_DEMAND)],
)
def test_model_answers_as_bf16_vllm_with_each_kind_of_layer_left_in_bf16(
    head: str, kind: str | None, is_official: bool, folders: Folders
) -> None:
    # Bug caught: an official checkpoint's LM head left out because config.json ties it; NaN for every token.
    ignore = [f"re:.*{kind}"] if kind else []
    served = answers(folders(head, is_official), **options(*ignore))
    assert served == bf16_answers(folders(head, False))


def takes_apart(model: torch.nn.Module) -> bool:
    """Return whether this vLLM looks for a stored head; 0.28 uses only config.json, and has one layer for both."""
    return model.lm_head is not model.model.embed_tokens


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("is_official", [False, True], ids=["bf16", "official"])
def test_equal_copy_of_the_embedding_is_held_once(
    is_official: bool, layout: str, folders: Folders, log_lines: list[str]
) -> None:
    # Bug caught: twice the bytes, although BF16 vLLM ties the two.
    with loaded(folders("tied", is_official), **options(layout=layout)) as model:
        tied = report.summarize(model)
    with loaded(folders("equal copy", is_official), **options(layout=layout)) as model:
        once = report.summarize(model)
        if takes_apart(model):
            head, embedding = map(packed_of, (model.lm_head, model.model.embed_tokens))
            assert head.payload is embedding.payload
            assert once.held_bytes == tied.held_bytes + head.desc.nbytes
        assert once.bf16_bytes == tied.bf16_bytes
    assert not [line for line in log_lines if "has another" in line]


def test_different_head_is_held_apart_with_a_warning(
    folders: Folders, log_lines: list[str]
) -> None:
    with loaded(folders("different", False), **options()) as model:
        if not takes_apart(model):
            return
        head, embedding = map(packed_of, (model.lm_head, model.model.embed_tokens))
        assert not torch.equal(head.payload, embedding.payload)
    assert len([line for line in log_lines if "the checkpoint has another lm_head" in line]) == 1


@pytest.mark.parametrize("ignore", [(), ("re:.*embed_tokens", "lm_head")], ids=["packed", "bf16"])
def test_update_that_makes_the_copy_differ_is_served_and_so_is_one_that_makes_it_equal_again(
    ignore: tuple[str, ...], folders: Folders
) -> None:
    # Bug caught: one parameter for both layers, into which an update writes one matrix and then the other.
    equal, different = folders("equal copy", False), folders("different", False)
    with engine(equal, **options(*ignore)) as llm:
        model = llm.llm_engine.model_executor.driver_worker.get_model()
        if not takes_apart(model):
            pytest.skip("this vLLM never looks at the stored head")
        found = []
        for path in (different, equal):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
            found.append(ask(llm))
        if not ignore:
            head, embedding = map(packed_of, (model.lm_head, model.model.embed_tokens))
            assert head.payload is embedding.payload
    assert found == [bf16_answers(different), bf16_answers(equal)]


def test_entries_of_ignore_that_match_nothing_are_said(
    folders: Folders, log_lines: list[str]
) -> None:
    # Bug caught: a misspelt name without a warning.
    given = ["model.layers.0.mlp.down", "re:.*o_proj", "lm_haed"]
    with loaded(folders("untied", False), **options(*given)):
        pass
    said = [line for line in log_lines if line.startswith("dfloat11: ignore: ")]
    assert len(said) == 1
    assert "'model.layers.0.mlp.down', 'lm_haed' matches no layer that would be" in said[0]


def test_ignored_head_that_is_the_embedding_is_said_to_be_held_as_that(
    folders: Folders, log_lines: list[str]
) -> None:
    with loaded(folders("tied", False), **options("lm_head")):
        pass
    said = [line for line in log_lines if line.startswith("dfloat11: ignore: ")]
    assert said == ["dfloat11: ignore: the LM head is the embedding, and is held as that is"]
