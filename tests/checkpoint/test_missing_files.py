"""A DFloat11 checkpoint with a missing or changed file, with and without a manifest."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_commands import only_line
from dfloat11_helpers import VECTORS, config, stored_unit, write_checkpoint

from vllm_dfloat.checkpoint.completeness import refuse_gaps
from vllm_dfloat.checkpoint.manifest import MANIFEST_FILE
from vllm_dfloat.checkpoint.patterns import compile_patterns
from vllm_dfloat.checkpoint.reader import open_checkpoint
from vllm_dfloat.cli import main
from vllm_dfloat.convert.compress import compress
from vllm_dfloat.convert.source import open_source
from vllm_dfloat.errors import FormatError

SHIPPED = Path(__file__).parents[2] / "models" / "tiny"
IN_MANY_FILES = ("llama-tiny", "qwen3-tiny-tied", "phi3-tiny-fused")
COMMANDS = ("inspect", "verify", "decompress", "plan")


def refusal(command: str, folder: Path, target: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the sentence with which a command refuses the folder, having written nothing."""
    more = {"decompress": [str(target)], "plan": ["--gpu-memory", "1GiB"]}.get(command, [])
    assert main([command, str(folder), *more]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert not target.exists()
    return only_line(err)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compressed") / "df11"
    compress(open_source(SHIPPED), folder)
    return folder


@pytest.fixture
def made(compressed: Path, tmp_path: Path) -> Path:
    """Return a checkpoint made by `compress`, which a test may damage."""
    return Path(shutil.copytree(compressed, tmp_path / "made"))


@pytest.mark.parametrize("vector", IN_MANY_FILES)
def test_an_official_checkpoint_without_one_of_its_files_is_refused_naming_what_is_missing(
    vector: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Bug caught: decompress wrote a valid index without the layer and exited with 0.
    missing = {
        "model_layers_0.safetensors": "no tensor of model.layers.0,",
        "model_layers_1.safetensors": "no tensor of model.layers.1,",
        "lm_head.safetensors": "no tensor of lm_head,",
        "model_embed_tokens.safetensors": "no tensor of model.embed_tokens,",
        "model.safetensors": "no tensor of ",  # of the embedding, or of the last norm
    }
    for file in sorted((VECTORS / f"{vector}-df11").glob("*.safetensors")):
        folder = Path(shutil.copytree(VECTORS / f"{vector}-df11", tmp_path / file.stem))
        (folder / file.name).unlink()
        for command in COMMANDS:
            line = refusal(command, folder, tmp_path / "out", capsys)
            assert line.startswith(f"vllm-dfloat: {folder}: {missing[file.name]}"), line
            assert "A weight file is missing" in line


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_the_manifest_lists_and_is_gone_is_named(
    command: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Bug caught: exit status 0 of all commands but verify, and a BF16 model without the layer.
    (made / "model_layers_1.safetensors").unlink()
    line = refusal(command, made, tmp_path / "out", capsys)
    assert f"{MANIFEST_FILE} lists: model_layers_1.safetensors is missing. Fetch" in line


@pytest.mark.parametrize(
    "name", ["model.safetensors", "lm_head.safetensors", "model_layers_0.safetensors"]
)
def test_without_its_manifest_a_checkpoint_made_here_is_held_against_its_config(
    name: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Bug caught: verify passed.
    (made / MANIFEST_FILE).unlink()
    assert main(["verify", str(made)]) == 0
    capsys.readouterr()
    (made / name).unlink()
    for command in COMMANDS:
        assert "no tensor of" in refusal(command, made, tmp_path / "out", capsys)


def rename(folder: Path) -> None:
    (folder / "lm_head.safetensors").rename(folder / "head.safetensors")


def truncate(folder: Path) -> None:
    file = folder / "lm_head.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def duplicate(folder: Path) -> None:
    shutil.copy(folder / "lm_head.safetensors", folder / "lm_head copy.safetensors")


def replace(folder: Path) -> None:
    shutil.copy(folder / "model_layers_0.safetensors", folder / "model_layers_1.safetensors")


def retype(folder: Path) -> None:
    """Write the dtype F16 for the last norm; its bytes and all sizes stay the same."""
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"BF16"', b'"F16" '))


def rename_a_tensor(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"model.norm.weight", b"model.morn.weight"))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (rename, "lm_head.safetensors is missing, head.safetensors is not listed. Fetch"),
        (truncate, r"lm_head.safetensors has \d+ bytes instead of \d+. Fetch"),
        (duplicate, "lists: lm_head copy.safetensors is not listed. Move what is not listed out"),
        (replace, "model_layers_1.safetensors has|the tensor is also in"),
        (retype, "model.safetensors holds tensors of other names, dtypes or shapes. Fetch"),
        (rename_a_tensor, "model.safetensors holds tensors of other names, dtypes or shapes. Fe"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_the_one_the_manifest_lists_ends_in_a_sentence(
    damage: Callable[[Path], None],
    told: str,
    command: str,
    made: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(made)
    line = refusal(command, made, tmp_path / "out", capsys)
    assert re.search(told, line), line


@pytest.mark.parametrize("damage", [truncate, duplicate, replace])
def test_without_a_manifest_a_wrong_file_ends_in_a_sentence_too(
    damage: Callable[[Path], None],
    made: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (made / MANIFEST_FILE).unlink()
    damage(made)
    for command in COMMANDS:
        line = refusal(command, made, tmp_path / "out", capsys)
        assert "Remove" not in line


def test_without_a_manifest_a_file_under_another_name_is_the_same(made: Path) -> None:
    names = open_checkpoint(made).names
    (made / MANIFEST_FILE).unlink()
    rename(made)
    assert open_checkpoint(made).names == names


def test_a_config_with_another_order_of_weights_is_refused_where_there_is_a_manifest(
    made: Path,
) -> None:
    # Bug caught: gate and up have one size, so they were served in each other's place in silence.
    config = json.loads((made / "config.json").read_text())
    config["extra"] = config.pop("vocab_size", 0)  # what else a user edits is free
    (made / "config.json").write_text(json.dumps(config))
    open_checkpoint(made)
    patterns = config["dfloat11_config"]["pattern_dict"]
    key = next(key for key in patterns if "mlp.up_proj" in patterns[key])
    names = {"mlp.gate_proj": "mlp.up_proj", "mlp.up_proj": "mlp.gate_proj"}
    patterns[key] = [names.get(name, name) for name in patterns[key]]
    (made / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        FormatError, match=r"not the one that dfloat11_manifest\.json was made with"
    ):
        open_checkpoint(made)


def test_a_manifest_of_an_earlier_version_has_no_headers_and_is_read(made: Path) -> None:
    content = json.loads((made / MANIFEST_FILE).read_text())
    assert content.pop("headers").keys() == {f.name for f in made.glob("*.safetensors")}
    assert len(content.pop("units")) == 64
    (made / MANIFEST_FILE).write_text(json.dumps(content))
    assert main(["verify", str(made), "--quiet"]) == 0


def test_a_compressed_tensor_that_only_the_manifest_knows_is_named(made: Path) -> None:
    content = json.loads((made / MANIFEST_FILE).read_text())
    content["tensors"]["model.layers.9.mlp.up_proj.weight"] = [2, 2]
    (made / MANIFEST_FILE).write_text(json.dumps(content))
    with pytest.raises(FormatError, match=r"missing, such as model\.layers\.9\.mlp\.up_proj"):
        open_checkpoint(made)


def test_files_that_are_no_weights_may_change_and_are_told_by_verify(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (made / "tokenizer.json").unlink()
    (made / "README.md").write_text("mine")
    assert main(["inspect", str(made), "--quiet"]) == 0
    assert main(["verify", str(made), "--quiet"]) == 1
    assert capsys.readouterr().out.startswith("tokenizer.json: ")


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ("model.layers.1.mlp.down_proj.weight", None),  # something of each block is enough here
        ("model.layers.1.", r"no tensor of model\.layers\.1, one of 3"),
        ("model.layers.2.", r"no tensor of model\.layers\.2, one of 3"),
        ("model.layers.", r"no tensor of model\.layers\.0, which"),
        ("model.embed_tokens.weight", "no tensor of an embedding"),
        ("model.norm.weight", "no tensor of the norm after the last block"),
        ("lm_head.weight", "no tensor of an LM head"),
        ("model.visual.blocks.0.", r"no tensor of model\.visual\.blocks\.0, one of 2"),
        ("model.visual.merger.mlp.0", None),
    ],
)
def test_what_a_language_model_must_have_is_found_without_its_class(
    missing: str, told: str | None, tmp_path: Path
) -> None:
    layer = ("self_attn.q_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight")
    names = {f"model.layers.{i}.{name}" for i in range(3) for name in layer}
    names |= {f"model.visual.blocks.{i}.attn.qkv.weight" for i in range(2)}
    names |= {f"model.visual.merger.mlp.{i}.weight" for i in (0, 2)}  # 1 has no weight
    names |= {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    keys = (r"model\.layers\.\d+", r"model.visual.blocks.\d+", r"model\.visual\.merger\.mlp")
    patterns = compile_patterns({key: [] for key in keys}, "config.json")
    whole: dict[str, Any] = {
        "architectures": ["SomeForConditionalGeneration"],
        "text_config": {"num_hidden_layers": 3},
        "tie_word_embeddings": False,
    }
    refuse_gaps(tmp_path, whole, patterns, names)
    left = {name for name in names if not name.startswith(missing)}
    assert left != names
    if told is None:
        refuse_gaps(tmp_path, whole, patterns, left)
        return
    with pytest.raises(FormatError, match=told):
        refuse_gaps(tmp_path, whole, patterns, left)


@pytest.mark.parametrize(
    ("names", "whole"),
    [
        # Pruned models with transformer blocks that have no tensors left.
        (["model.layers.0.a.weight", "model.layers.2.a.weight"], {"block_configs": [{}], "num_hidden_layers": 3}),
        # Layers that share their weights.
        (["encoder.albert_layer_groups.0.a.weight"], {"num_hidden_layers": 12}),
        # Two stacks of layers; config.json counts one of them.
        (["encoder.layers.0.a.weight", "x.layers.0.a.weight", "y.layers.0.a.weight"], {"num_hidden_layers": 4}),
        # More transformer blocks than counted: those that predict further tokens (MTP).
        ([f"model.layers.{i}.a.weight" for i in range(3)], {"num_hidden_layers": 2}),
        # No architecture, tied, norms without weights.
        (["model.layers.0.a.weight", "model.embed_tokens.weight"],
         {"num_hidden_layers": 1, "architectures": ["OlmoForCausalLM"], "tie_word_embeddings": True}),
        (["a.weight"], {"num_hidden_layers": "many", "architectures": "none"}),
        (["double_blocks.0.a.weight"], {"model_type": "llama"}),
    ],
)  # fmt: skip
def test_models_of_other_kinds_are_not_taken_for_broken(
    names: list[str], whole: dict[str, Any], tmp_path: Path
) -> None:
    refuse_gaps(tmp_path, whole, compile_patterns({}, "config.json"), names)


def test_numbers_of_any_size_are_compared_at_once(tmp_path: Path) -> None:
    names = [f"model.layers.{'9' * 400}.a.weight"]
    patterns = compile_patterns({r"model\.layers\.\d+": []}, "config.json")
    with pytest.raises(FormatError, match=r"no tensor of model\.layers\.0,"):
        refuse_gaps(tmp_path, {"num_hidden_layers": 10**300}, patterns, names)


def test_a_checkpoint_in_numbered_files_needs_all_of_them(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"odd77": stored_unit("edge-good", "odd77")})
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(FormatError, match=r"holds 1 of 2 files .* not model-00002-of-00002"):
        open_checkpoint(tmp_path)


def test_a_unit_that_a_key_names_and_no_file_holds_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"odd77": stored_unit("edge-good", "odd77")})
    whole = {"dfloat11_config": config({"odd77": [], r"lm\.head": []})}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    with pytest.raises(FormatError, match=r"no tensor of lm\.head, which is a key of pattern_dict"):
        open_checkpoint(tmp_path)
