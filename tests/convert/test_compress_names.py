"""Models whose tensors have unusual names: compressed so that every command reads the result, or refused before."""

import itertools
from pathlib import Path

import pytest
import torch
from cli_commands import only_line
from small_models import bf16, make_model

from vllm_dfloat.checkpoint.reader import open_checkpoint
from vllm_dfloat.checkpoint.verify import compare
from vllm_dfloat.cli import main
from vllm_dfloat.convert import compress as module
from vllm_dfloat.dfloat11.format import FIELDS
from vllm_dfloat.errors import FormatError

BASE = {
    "model.embed_tokens.weight": bf16(96, 64),
    "model.layers.0.mlp.up_proj.weight": bf16(64, 64),
    "model.norm.weight": bf16(1, 64)[0],
}


def circle(model: Path, folder: Path) -> None:
    """Run every command on a model and on its compressed form; each must succeed."""
    there, back = str(folder / "t"), str(folder / "b")
    for command in (
        ["compress", str(model), there],
        ["inspect", there],
        ["verify", there],
        ["verify", there, "--against", str(model)],
        ["decompress", there, back],
        ["verify", back, "--against", str(model)],
    ):
        assert main([*command, "--quiet"]) == 0, command
    names = [path.name for path in Path(there).glob("*.safetensors")]
    assert not any(name.startswith(".") for name in names)


@pytest.mark.parametrize(
    ("names", "units"),
    [
        (("0.weight", "2.weight"), {"0": (), "2": ()}),
        (("0.weight", "0.a.weight", "10.weight"), {"0": (), "10": ()}),
        (("head.weight", "head.0.weight"), {"head": ()}),
        ((".weight", "a.weight"), {"a": ()}),
        ((".0.weight", "a.weight"), {"a": ()}),
        (("weight", "a.weight"), {"a": ()}),
        (("a..weight",), {"a.": ()}),
    ],
)
def test_names_of_few_parts_give_a_checkpoint_that_every_command_reads(
    names: tuple[str, ...], units: dict[str, tuple[str, ...]], tmp_path: Path
) -> None:
    # Bug caught: a unit without a name, in a file named ".safetensors", which is hidden.
    tensors = {name: bf16(64, 64, seed=i) for i, name in enumerate(names)}
    biases = {"2.bias": bf16(1, 64)[0], ".bias": bf16(1, 64, seed=2)[0]}
    circle(make_model(tmp_path / "m", {**tensors, **biases}), tmp_path)
    found = open_checkpoint(tmp_path / "t").units
    assert {name: unit.members for name, unit in found.items()} == units


def test_a_weight_without_a_module_stays_with_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model(tmp_path / "m", {**BASE, ".weight": bf16(64, 64)})
    assert main(["compress", str(model), str(tmp_path / "t")]) == 0
    assert (
        ".weight: stays as it is: the module that it is of has no name" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "name", [*(f"model.layers.0.{field}" for field in FIELDS), "x.gaps", "x.luts"]
)
def test_a_tensor_that_is_named_as_those_of_a_unit_is_refused_before_anything_is_written(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Bug caught: exit status 0, and then "found gaps without encoded_exponent" from every other command.
    model = make_model(tmp_path / "m", {**BASE, name: bf16(1, 64)[0]})
    assert main(["compress", str(model), str(tmp_path / "t")]) == 2
    line = only_line(capsys.readouterr().err)
    taken = name.endswith(("luts", "gaps"))
    assert (f"model.safetensors: {name}: is named as" if taken else "is a DFloat11 checkpoint") in line  # fmt: skip
    assert not (tmp_path / "t").exists()


def test_such_a_name_alone_is_no_units(tmp_path: Path) -> None:
    circle(make_model(tmp_path / "m", {**BASE, "gaps": bf16(1, 64)[0]}), tmp_path)


def test_a_result_that_cannot_be_read_stays_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # For names that the earlier checks miss: here these checks are switched off.
    monkeypatch.setattr(module, "refuse_unit_names", lambda *arguments: None)
    model = make_model(tmp_path / "m", {**BASE, "x.gaps": bf16(1, 64)[0]})
    command = ["compress", str(model), str(tmp_path / "t")]
    for _ in range(2):
        assert main(command) == 2
        line = only_line(capsys.readouterr().err)
        assert (
            f"{tmp_path / 't'}: was written, but cannot be read again: {tmp_path / 't'}/model"
            in line
        )
    assert main(["verify", str(tmp_path / "t")]) == 2
    assert "unfinished" in only_line(capsys.readouterr().err)


def test_a_tensor_that_is_lost_or_of_another_shape_is_found(tmp_path: Path) -> None:
    from vllm_dfloat.convert.read_back import read_back
    from vllm_dfloat.convert.source import open_source

    source = open_source(make_model(tmp_path / "m", BASE))
    module.compress(source, tmp_path / "t")
    read_back(tmp_path / "t", source.tensors)
    other = make_model(tmp_path / "o", {**BASE, "model.norm.weight": torch.zeros(63).bfloat16()})
    more = make_model(tmp_path / "p", {**BASE, "added": bf16(1, 64)[0]})
    for model, what in ((other, r"model.norm.weight is \(64,\), \(63,\) before"), (more, "added is None")):  # fmt: skip
        with pytest.raises(FormatError, match=what):
            read_back(tmp_path / "t", open_source(model).tensors)


def test_names_at_random_are_read_again_or_left(tmp_path: Path) -> None:
    parts = ["", "0", "7", "a", "weight", "experts", "w+", "é", "layers"]
    names = [".".join(p) for n in (1, 2, 3) for p in itertools.product(parts, repeat=n)]
    tensors = {f"{name}.weight": bf16(32, 32, seed=i) for i, name in enumerate(names) if name}
    model = make_model(tmp_path / "m", tensors)
    assert main(["compress", str(model), str(tmp_path / "t"), "--quiet"]) == 0
    assert compare(tmp_path / "t", model).is_equal
