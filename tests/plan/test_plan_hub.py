"""Models by hub id: from the cache, from a server that imitates the hub, and the errors without either."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import COMMIT, hub_server
from tiny_models import SHIPPED

CONFIGS = Path(__file__).parents[1] / "data" / "configs"


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    """Yield the address of a hub, and the list of paths requested from it."""
    model = tmp_path_factory.mktemp("model")
    (model / "config.json").write_bytes((CONFIGS / "Llama-3.1-8B.json").read_bytes())
    with hub_server({"org/model": model}) as served:
        yield served


def plan(model: str, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vllm_dfloat.cli", "plan", model, "--gpu-memory", "24GiB", "--json"]  # fmt: skip
    variables = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(cache), **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)


def test_only_the_config_is_fetched_and_then_the_cache_needs_no_network(
    hub: tuple[str, list[str]], tmp_path: Path
) -> None:
    address, asked = hub
    first = plan("org/model", tmp_path, HF_ENDPOINT=address)
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["parameters"] == 8_030_261_248
    # Only paths of the model; huggingface_hub also requests a list for itself.
    assert {path for path in asked if "/org/" in path} == {"/org/model/resolve/main/config.json"}
    cached = plan("org/model", tmp_path, HF_HUB_OFFLINE="1")
    assert json.loads(cached.stdout) == json.loads(first.stdout)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("org/unknown", "knows no such model, or keeps it private"),
        ("org/gated", "its licence must be accepted first"),
        ("org/empty", "the model has no config.json"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(
    model: str, sentence: str, hub: tuple[str, list[str]], tmp_path: Path
) -> None:
    result = plan(model, tmp_path, HF_ENDPOINT=hub[0])
    assert result.returncode == 2
    assert result.stderr.startswith(f"vllm-dfloat: {model}: no such folder, and no config.json")
    assert sentence in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE forbids fetching it"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "Check the network"),
    ],
)
def test_without_a_network_an_absent_model_is_one_sentence(
    environment: dict[str, str], sentence: str, tmp_path: Path
) -> None:
    # Bug caught: six tries, a warning line for each.
    result = plan("org/model", tmp_path, **environment)
    assert result.returncode == 2
    assert sentence in result.stderr
    assert str(tmp_path) in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("is_whole", [True, False])
def test_weights_in_the_cache_count_where_they_are_whole(is_whole: bool, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (tmp_path / "models--org--tiny" / "refs").mkdir()
    (tmp_path / "models--org--tiny" / "refs" / "main").write_text(COMMIT)
    (snapshot / "config.json").write_bytes((SHIPPED / "config.json").read_bytes())
    name = "model.safetensors" if is_whole else "model-00001-of-00002.safetensors"
    (snapshot / name).symlink_to(SHIPPED / "model.safetensors")
    result = plan("org/tiny", tmp_path, HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    notes = json.loads(result.stdout)["notes"]
    assert any("checked against the files" in note for note in notes) is is_whole
    assert any("a part of the weights only" in note for note in notes) is not is_whole


def test_a_name_that_is_no_hub_id_says_what_one_looks_like(tmp_path: Path) -> None:
    result = plan("Llama-3.1-405B", tmp_path)
    assert result.returncode == 2
    assert "no such file or folder" in result.stderr
    assert "a hub id, such as meta-llama/Llama-3.1-405B" in result.stderr
