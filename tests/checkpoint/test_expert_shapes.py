"""Shapes of experts from a model class that holds all experts of a layer in two parameters."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers

from vllm_dfloat.checkpoint.expert_shapes import of_single_experts
from vllm_dfloat.checkpoint.manifest import MANIFEST_FILE
from vllm_dfloat.checkpoint.reader import open_checkpoint
from vllm_dfloat.checkpoint.shapes import model_shapes, resolve_shape
from vllm_dfloat.checkpoint.weights import weights
from vllm_dfloat.convert.compress import compress
from vllm_dfloat.convert.source import open_source


def mixtral(path: Path) -> Path:
    """Write a random Mixtral: its checkpoints name matrices w1 to w3, and experts otherwise than the class."""
    config = transformers.MixtralConfig(**tiny_models.SHAPE, num_local_experts=4)
    torch.manual_seed(5)
    transformers.MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_a_mixture_without_its_manifest_is_read_as_it_was(name: str, tmp_path: Path) -> None:
    # Bug caught: "experts.0.gate_proj has 32768 weights in the file, and the model has no module of that name".
    made = mixtral(tmp_path / "m") if name == "mixtral" else tiny_models.save(name, tmp_path / "m")
    compress(open_source(made), tmp_path / "df11")
    (tmp_path / "df11" / MANIFEST_FILE).unlink()
    found = dict(weights(open_checkpoint(tmp_path / "df11"), model_shapes(tmp_path / "df11")))
    expected = tiny_models.tensors(made)
    assert any(".experts.3." in tensor for tensor in expected)
    assert found.keys() == expected.keys()
    for tensor, value in expected.items():
        assert torch.equal(found[tensor].view(torch.uint16), value.view(torch.uint16)), tensor


def test_matrices_that_the_class_has_turned_around_get_no_shape() -> None:
    turned = {"x.experts.gate_up_proj": (4, 64, 192), "x.experts.down_proj": (4, 96, 64)}
    assert of_single_experts(turned) == {}
    assert of_single_experts({"x.experts.gate_up_proj": (4, 192, 64)}) == {}


def test_modules_are_gone_through_once_however_many_experts_have_other_prefixes() -> None:
    # Bug caught: every expert was compared with all others, for an hour with 62 layers of 256.
    class Counted(dict[str, tuple[int, ...]]):
        times = 0

        def __iter__(self) -> Iterator[str]:
            self.times += 1
            return super().__iter__()

    shapes = Counted(
        of_single_experts(
            {"a.mlp.experts.gate_up_proj": (8, 12, 4), "a.mlp.experts.down_proj": (8, 4, 6)}
        )
    )
    paths = [f"b.moe.experts.{k}.{name}" for k in range(8) for name in ("w1", "w2")]
    found = [resolve_shape(path, 24, shapes, "f") for path in paths]
    assert found == [(6, 4), (4, 6)] * 8
    assert shapes.times == 1
