"""Folders without a complete model: those of an interrupted command, and DFloat11 files without a config.json."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_commands import only_line
from dfloat11_helpers import VECTORS, config, stored_unit, write_checkpoint
from fuzz.folder import pack, unpack
from safetensors.numpy import load_file, save_file

from vllm_dfloat.checkpoint.folder import CONFIG_KEY
from vllm_dfloat.checkpoint.listing import weight_files
from vllm_dfloat.checkpoint.manifest import MANIFEST_FILE
from vllm_dfloat.checkpoint.model_class import (
    meta_model,
    missing_parameters,
    refuse_missing_parameters,
)
from vllm_dfloat.checkpoint.reader import open_checkpoint
from vllm_dfloat.cli import main
from vllm_dfloat.convert.compress import compress
from vllm_dfloat.convert.decompress import decompress
from vllm_dfloat.convert.source import open_source
from vllm_dfloat.errors import DFloatError, FormatError, UnsupportedError
from vllm_dfloat.integration import front_end

SHIPPED = Path(__file__).parents[2] / "models" / "tiny"
LLAMA = VECTORS / "llama-tiny-df11"
COMMANDS = ("inspect", "verify", "verify --against", "decompress", "plan", "compress", "serve")


def refusal(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the sentence with which a command, or vLLM's front end, refuses the folder."""
    if command == "serve":
        with pytest.raises(DFloatError) as error:
            front_end.refuse(folder)
        return str(error.value)
    more = {
        "decompress": [str(folder.parent / "out")],
        "compress": [str(folder.parent / "out")],
        "plan": ["--gpu-memory", "1GiB"],
        "verify --against": ["--against", str(SHIPPED)],
    }.get(command, [])
    assert main([command.split()[0], str(folder), *more]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert not (folder.parent / "out").exists()
    return only_line(err)


def stop_after(files: int, target: Path) -> Callable[[int], None]:
    """Return a callback that ends a command as Ctrl-C does, after this number of finished weight files."""

    def advance(num_bytes: int) -> None:
        if len(weight_files(target)) >= files:
            raise KeyboardInterrupt

    return advance


@pytest.fixture
def half_compressed(tmp_path: Path) -> Path:
    target = tmp_path / "half"
    with pytest.raises(KeyboardInterrupt):
        compress(open_source(SHIPPED), target, workers=1, advance=stop_after(2, target))
    assert not (target / "config.json").exists()
    return target


@pytest.fixture
def half_decompressed(tmp_path: Path) -> Path:
    target = tmp_path / "half"
    with pytest.raises(KeyboardInterrupt):
        decompress(LLAMA, target, workers=1, advance=stop_after(2, target), shard_bytes=300_000)
    return target


@pytest.mark.parametrize("command", COMMANDS)
def test_a_half_finished_compression_is_called_unfinished(
    command: str, half_compressed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Bug caught: verify exited with 0, inspect said "nothing is compressed on disk".
    line = refusal(command, half_compressed, capsys)
    assert f"{half_compressed}: unfinished: " in line
    assert f"Run vllm-dfloat compress SOURCE {half_compressed} again" in line


def test_the_command_in_the_sentence_finishes_it(half_compressed: Path) -> None:
    assert main(["compress", str(SHIPPED), str(half_compressed), "--quiet"]) == 0
    assert main(["verify", str(half_compressed), "--against", str(SHIPPED), "--quiet"]) == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_a_half_finished_decompression_is_called_unfinished(
    command: str, half_decompressed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(command, half_decompressed, capsys)
    assert f"Run vllm-dfloat decompress SOURCE {half_decompressed} again" in line


@pytest.mark.parametrize("command", COMMANDS)
def test_an_old_config_makes_a_half_finished_compression_no_model(
    command: str, half_compressed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Bug caught: compress --force leaves the config.json of the replaced model there until it ends.
    shutil.copy(LLAMA / "config.json", half_compressed)
    assert "unfinished" in refusal(command, half_compressed, capsys)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_copy_of_a_half_finished_compression_without_hidden_files_is_no_model(
    command: str, half_compressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(half_compressed, copy, ignore=shutil.ignore_patterns(".*"))
    line = refusal(command, copy, capsys)
    if command == "compress":  # of it, into another folder
        assert "is a DFloat11 checkpoint already" in line
        return
    assert f"{copy}: found no config.json and DFloat11 units, such as 'model." in line
    assert f"run vllm-dfloat compress SOURCE {copy} --force again" in line
    if command == "verify":
        assert main(["compress", str(SHIPPED), str(copy), "--force", "--quiet"]) == 0
        assert main(["verify", str(copy), "--quiet"]) == 0


def test_a_copy_of_a_half_finished_decompression_is_missing_shards(
    half_decompressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(half_decompressed, copy, ignore=shutil.ignore_patterns(".*"))
    for command in ("inspect", "verify", "compress"):
        assert "holds 2 of " in refusal(command, copy, capsys)


def test_weights_without_a_config_are_not_verified_but_can_be_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(SHIPPED / "model.safetensors", tmp_path)
    assert "has no config.json, so nothing says whether all of a model is here" in refusal(
        "verify", tmp_path, capsys
    )
    assert main(["verify", str(tmp_path), "--against", str(SHIPPED)]) == 0
    front_end.refuse(tmp_path)  # vLLM itself says that there is no config.json
    front_end.refuse(tmp_path / "org/name")  # it may be an id of the hub


def test_a_checkpoint_that_lost_its_config_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compress(open_source(SHIPPED), tmp_path / "df11")
    (tmp_path / "df11/config.json").unlink()
    line = refusal("verify", tmp_path / "df11", capsys)
    assert f"{MANIFEST_FILE} beside it was made with one that has {CONFIG_KEY}. Fetch" in line


# Files for ComfyUI: one safetensors file, the settings in the node that loads it, or in the metadata of the header.


def comfy(
    folder: Path, metadata: dict[str, str], units: tuple[str, ...] = ("odd77", "nine")
) -> Path:
    folder.mkdir()
    tensors = {
        f"{unit}.{field}": array
        for unit in units
        for field, array in stored_unit("edge-good", unit).items()
    }
    save_file(tensors, folder / "flux-DF11.safetensors", metadata)
    return folder


def test_a_file_with_its_settings_in_the_header_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Bug caught: verify decoded nothing and exited with 0; inspect listed the parts of units as plain tensors.
    settings = json.dumps(config({"odd77": [], "nine": []}))
    folder = comfy(tmp_path / "comfy", {CONFIG_KEY: settings, "format": "pt"})
    assert main(["inspect", str(folder), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["modules"]
    assert {(row["name"], row["kind"]) for row in rows} == {
        ("odd77", "dfloat11"),
        ("nine", "dfloat11"),
    }
    assert main(["verify", str(folder)]) == 0
    assert "2 tensors, 172 bytes decode without an error" in capsys.readouterr().out
    file = folder / "flux-DF11.safetensors"
    tensors = load_file(file)
    tensors["odd77.encoded_exponent"][:] = 0xFF
    save_file(tensors, file, {CONFIG_KEY: settings})
    assert "odd77.encoded_exponent: window " in refusal("verify", folder, capsys)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_without_settings_says_what_it_is_and_what_it_needs(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = comfy(tmp_path / "comfy", {"format": "pt"})
    line = refusal(command, folder, capsys)
    if command == "compress":
        assert "is a DFloat11 checkpoint already" in line
        return
    assert f"{folder}: found no config.json and DFloat11 units, such as 'nine'" in line
    assert f"made for ComfyUI needs a config.json with the {CONFIG_KEY} that its node holds" in line


def test_the_advice_for_it_works(tmp_path: Path) -> None:
    folder = comfy(tmp_path / "comfy", {})
    whole = {CONFIG_KEY: config({"odd77": [], "nine": []})}
    (folder / "config.json").write_text(json.dumps(whole))
    assert main(["verify", str(folder), "--quiet"]) == 0


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[]", r"found list; an object with version"),
        (json.dumps({**config({}), "bytes_per_thread": 4}), "8 is the only published value"),
    ],
)
def test_settings_in_a_header_are_checked_like_those_in_config_json(
    metadata: str, told: str, tmp_path: Path
) -> None:
    folder = comfy(tmp_path / "comfy", {CONFIG_KEY: metadata})
    with pytest.raises(
        DFloatError, match=rf"^\S+/flux-DF11.safetensors: {CONFIG_KEY} in its header: .*{told}"
    ):
        open_checkpoint(folder)


def test_files_with_different_settings_are_not_one_checkpoint(tmp_path: Path) -> None:
    folder = comfy(tmp_path / "comfy", {CONFIG_KEY: json.dumps(config({"odd77": []}))}, ("odd77",))
    other = comfy(tmp_path / "other", {CONFIG_KEY: json.dumps(config({"nine": []}))}, ("nine",))
    shutil.copy(other / "flux-DF11.safetensors", folder / "other.safetensors")
    with pytest.raises(FormatError, match=r"differs from that of other\.safetensors"):
        open_checkpoint(folder)


def test_one_piece_of_a_unit_is_enough_to_be_no_plain_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path, {"odd77": stored_unit("edge-good", "odd77")})
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    file = tmp_path / "model.safetensors"
    tensors = [t for t in unpack(file.read_bytes()) if t.name.endswith("sign_mantissa")]
    file.write_bytes(pack(tensors))
    for command in ("inspect", "verify", "decompress"):
        line = refusal(command, tmp_path, capsys)
        assert f"a config.json without {CONFIG_KEY} and DFloat11 units" in line


# What only the class of the model knows.


@pytest.mark.parametrize("vector", ["llama-tiny", "qwen3-tiny-tied", "phi3-tiny-fused"])
def test_a_checkpoint_without_one_tensor_is_refused_where_the_models_class_can_be_asked(
    vector: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(VECTORS / f"{vector}-df11", tmp_path / "model"))
    file = folder / "model_layers_1.safetensors"
    tensors = unpack(file.read_bytes())
    name = "model.layers.1.post_attention_layernorm.weight"
    file.write_bytes(pack([tensor for tensor in tensors if tensor.name != name]))
    for command in ("verify", "decompress"):
        line = refusal(command, folder, capsys)
        assert (
            f"1 tensors of the model that config.json describes are missing, such as {name};"
            in line
        )


def gemma(**changes: Any) -> Any:
    from transformers import Gemma3Config, Gemma3TextConfig, SiglipVisionConfig

    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    text = Gemma3TextConfig(**sizes, num_key_value_heads=1, head_dim=16, vocab_size=64)
    return Gemma3Config(text_config=text, vision_config=SiglipVisionConfig(**sizes))


def test_prefixes_and_experts_of_other_versions_are_not_missing() -> None:
    from transformers import MixtralConfig

    built = meta_model(gemma())
    today = [name for name, _ in built.named_parameters()]
    older = [
        name.replace("model.language_model.", "language_model.model.").replace(
            "model.vision_tower.", "vision_tower.vision_model."
        )
        for name in today
    ]
    assert missing_parameters(built, older) == []
    layer = [name for name in older if ".layers.1.mlp.up_proj" not in name or "vision" in name]
    assert missing_parameters(built, layer) == ["model.language_model.layers.1.mlp.up_proj.weight"]
    norm = [name for name in older if name != "language_model.model.norm.weight"]
    assert missing_parameters(built, norm) == ["model.language_model.norm.weight"]

    mixtral = meta_model(
        MixtralConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_local_experts=2,
            vocab_size=64,
        )
    )
    stored = [name for name, _ in mixtral.named_parameters() if "experts" not in name]
    stored += [
        f"model.layers.{i}.block_sparse_moe.experts.{j}.w1.weight" for i in (0, 1) for j in (0, 1)
    ]
    assert missing_parameters(mixtral, stored) == []


def test_either_name_of_a_tied_matrix_is_enough() -> None:
    built = meta_model(VECTORS / "qwen3-tiny-tied-df11")
    names = [name for name, _ in built.named_parameters()]
    head = ["lm_head.weight" if "embed_tokens" in name else name for name in names]
    assert head != names
    assert missing_parameters(built, head) == []
    neither = [name for name in names if "embed_tokens" not in name]
    assert missing_parameters(built, neither) == ["model.embed_tokens.weight"]


def test_without_transformers_the_class_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(LLAMA / "config.json", tmp_path)
    with pytest.raises(FormatError, match="2 tensors of the model"):
        refuse_missing_parameters(tmp_path, ["model.layers.9.mlp.up_proj.weight"], tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    refuse_missing_parameters(tmp_path, ["model.layers.9.mlp.up_proj.weight"], tmp_path)


def test_a_class_that_is_not_known_is_not_asked(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "none of today"}')
    refuse_missing_parameters(tmp_path, [], tmp_path)
    with pytest.raises(UnsupportedError):
        meta_model(tmp_path)
