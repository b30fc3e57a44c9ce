"""Commands that are given hub ids, with a server that imitates the hub: what they fetch, compare and say."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_commands import make_places, only_line
from hub_server import hub_server

Hub = tuple[str, Path, Path]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Yield the address of a hub with org/bf16 and org/df11, a cache that is shared, and an empty folder."""
    root = tmp_path_factory.mktemp("hub")
    places = make_places(root)
    (root / "empty").mkdir()
    # A copy of the weights, which is not fetched.
    (places["bf16"] / "pytorch_model.bin").write_bytes(b"a pickle")
    models = {f"org/{name}": places[name] for name in ("bf16", "df11")}
    with hub_server(models) as (address, _):
        yield address, root / "cache", root / "empty"


def run(*args: object, hub: Hub, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in an empty folder, so that no id is the name of a folder."""
    address, cache, cwd = hub
    package = str(Path(__file__).parents[2])
    variables = {
        **os.environ, "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(cache), "HF_ENDPOINT": address,
        "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")]), **environment,
    }  # fmt: skip
    command = [sys.executable, "-m", "vllm_dfloat.cli", *map(str, args)]
    return subprocess.run(
        command, env=variables, cwd=cwd, capture_output=True, text=True, timeout=120
    )


def test_a_checkpoint_and_its_original_are_fetched_and_compared(hub: Hub) -> None:
    # Bug caught: "no such folder" for the id that `compress` had just taken.
    done = run("verify", "org/df11", "--against", "org/bf16", hub=hub)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("org/df11: equal to org/bf16, bit for bit (2 tensors")
    fetched = {file.name for file in (hub[1] / "models--org--bf16").glob("snapshots/*/*")}
    assert fetched == {"config.json", "model.safetensors"}
    # From now on the cache needs no network.
    offline = run("verify", "org/df11", "--against", "org/bf16", "--json", hub=hub, HF_HUB_OFFLINE="1")  # fmt: skip
    assert offline.returncode == 0, offline.stderr
    found = json.loads(offline.stdout)
    assert (found["path"], found["against"], found["equal"]) == ("org/df11", "org/bf16", True)


def test_every_command_that_reads_a_checkpoint_takes_an_id(hub: Hub, tmp_path: Path) -> None:
    inspected = run("inspect", "org/df11", "--json", hub=hub)
    local = run("inspect", hub[2].parent / "df11", "--json", hub=hub)
    assert inspected.returncode == 0, inspected.stderr
    found, expected = json.loads(inspected.stdout), json.loads(local.stdout)
    assert "models--org--df11" in found.pop("path")
    del expected["path"]
    assert found == expected
    for command, given in (("compress", "org/bf16"), ("decompress", "org/df11")):
        done = run(command, given, tmp_path / command, "--quiet", hub=hub)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    same = run("verify", tmp_path / "compress", "--against", tmp_path / "decompress", hub=hub)
    assert same.returncode == 0, same.stdout + same.stderr


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("org/unknown", "knows no such model, or keeps it private (then log in with hf auth login). Check the name"),
        ("org/gated", "its licence must be accepted first: open http"),
    ],
)  # fmt: skip
def test_what_the_hub_refuses_is_one_sentence(model: str, sentence: str, hub: Hub) -> None:
    done = run("verify", model, "--quiet", hub=hub)
    assert done.returncode == 2
    line = only_line(done.stderr)
    assert line.startswith(f"vllm-dfloat: {model}: no such folder, and the model of that id cannot")
    assert sentence in line


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE forbids fetching it. Unset that, or give a folder."),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "Check the network, or give a folder."),
    ],
)  # fmt: skip
def test_without_a_network_an_absent_model_is_one_sentence(
    environment: dict[str, str], sentence: str, hub: Hub
) -> None:
    done = run("decompress", "org/other", "out", hub=hub, **environment)
    assert done.returncode == 2
    assert only_line(done.stderr).endswith(sentence)
    assert not (hub[2] / "out").exists()


def test_a_cache_that_cannot_be_written_is_named(hub: Hub, tmp_path: Path) -> None:
    # Bug caught: "Check the network", for a full or read-only disk.
    (tmp_path / "file").write_bytes(b"")
    cache = tmp_path / "file" / "cache"
    done = run("verify", "org/df11", "--quiet", hub=hub, HF_HUB_CACHE=str(cache))
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]  # huggingface_hub logs what it tried
    assert f"{cache} cannot be written (" in line
    assert line.endswith("set HF_HUB_CACHE to another folder, or give a folder.")


def test_a_path_that_is_no_id_is_not_sought_on_the_hub(hub: Hub) -> None:
    for given in ("./org/bf16", "nothing"):
        done = run("inspect", given, hub=hub)
        assert done.returncode == 2
        assert "no such folder; expected the folder of a checkpoint" in only_line(done.stderr)
