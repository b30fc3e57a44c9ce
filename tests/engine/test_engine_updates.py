"""Weights that are written into a running engine: each way takes effect exactly, or raises and changes nothing."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from conftest import Checkpoint
from engines import bf16_answers, engine
from refused_updates import REFUSED, shape
from safetensors.torch import load_file
from served import (
    AS_BEFORE,
    ATTENTION,
    EMBEDDING,
    MLP,
    NORM,
    NUM_TOKENS,
    O_PROJ,
    QKV,
    Change,
    InProcessTransfer,
    K,
    Served,
    Tensors,
    from_one_buffer,
)
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer import WeightTransferEngineFactory

from vllm_dfloat.checkpoint.reader import open_checkpoint
from vllm_dfloat.convert.compress import compress
from vllm_dfloat.convert.source import open_source
from vllm_dfloat.errors import FormatError
from vllm_dfloat.integration.layers.method import PackedMethod

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def both(bf16_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Any:
    second = tiny_models.save("qwen2", tmp_path_factory.mktemp("second") / "model", seed=7)
    return bf16_checkpoint("qwen2"), second


@pytest.fixture(scope="module")
def expected(both: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the answers of BF16 vLLM with each set of changes; its end would destroy the process groups of a running
    engine, so it runs first."""
    changes = {change for _, change in EFFECTIVE.values()}
    answers = {
        change: changed_answers(both, change, tmp_path_factory.mktemp("edited"))
        for change in changes
    }
    return {name: answers[change] for name, (_, change) in EFFECTIVE.items()}


@pytest.fixture(scope="module")
def running(both: tuple[Path, Path], expected: dict[str, Any]) -> Iterator[Served]:
    # A model with biases; one of its fused layers stays BF16, and some of the others are in host memory.
    settings = dict(
        cpu_offload_gb=0.001,
        additional_config={"dfloat11": {"ignore": [f"{MLP}.gate_proj", f"{MLP}.up_proj"]}},
        weight_transfer_config=WeightTransferConfig(backend="in_process"),
    )
    WeightTransferEngineFactory.register_engine("in_process", InProcessTransfer)
    with engine(both[0], quantization="dfloat11", **settings) as llm:
        yield Served(llm, *both)


@pytest.fixture
def changing(running: Served) -> Iterator[Served]:
    """Yield the engine to a test that changes its weights, and restore them afterwards."""
    yield running
    running.reload(weights_path=str(running.first))
    assert running.ask() == running.answers


def changed_answers(both: tuple[Path, Path], change: Change, folder: Path) -> Any:
    """Return the answers of BF16 vLLM with the first checkpoint after some of its tensors are changed."""
    first, second = (load_file(path / "model.safetensors") for path in both)
    path = shutil.copytree(both[0], folder / "model")
    tiny_models.edit(path, lambda tensors: tensors.update(change(first, second)))
    return [
        {
            **answer,
            "tokens": answer["tokens"][:NUM_TOKENS],
            "logprobs": answer["logprobs"][:NUM_TOKENS],
        }
        for answer in bf16_answers(path)
    ]


@pytest.mark.parametrize(("write", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_says_why_and_changes_nothing(
    write: Callable[[Served], Any], error: type[BaseException], words: str, running: Served
) -> None:
    # Bug caught: weights lost without an error; an engine that is dead after a failed update.
    if words.startswith(f"{EMBEDDING}: reset_weights") and not hasattr(
        running.worker, "reset_weights"
    ):
        pytest.skip("this vLLM has none")
    before = running.bits()
    with pytest.raises(error, match=words):
        write(running)
    after = running.bits()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert running.ask() == running.answers


def test_checksums_of_vllm_are_those_of_the_checkpoint(running: Served) -> None:
    # Bug caught: all compressed layers had the checksum of an empty tensor, so no change of them could be seen.
    if not hasattr(running.worker, "compute_weight_checksums"):
        pytest.skip("this vLLM has none")
    (found,) = running.llm.collective_rpc("compute_weight_checksums")
    for name in (f"{O_PROJ}.weight", f"{EMBEDDING}.weight", NORM):
        content = running.old[name].view(torch.uint8).numpy().tobytes()
        digests = [digest for key, digest in found.items() if key.endswith(f":{name}")]
        assert digests == [hashlib.sha256(content).hexdigest()]


def everything(first: Tensors, second: Tensors) -> Tensors:
    return second


def block(first: Tensors, second: Tensors) -> Tensors:
    return {name: tensor for name, tensor in second.items() if "layers.0." in name}


def q_proj(first: Tensors, second: Tensors) -> Tensors:
    return {name: tensor for name, tensor in second.items() if "layers.0.self_attn.q_proj" in name}


def doubled_norm(first: Tensors, second: Tensors) -> Tensors:
    return {NORM: first[NORM] * 2}


# name: (the update, the tensors that it changes)
EFFECTIVE: dict[str, tuple[Callable[[Served], Any], Change]] = {
    "reload of a path": (lambda s: s.reload(weights_path=str(s.second)), everything),
    "reload of an iterator": (lambda s: s.iterate(s.new.items()), everything),
    "reload of one block": (lambda s: s.iterate(s.some("layers.0.")), block),
    "load_weights": (lambda s: s.model.load_weights(s.new.items()), everything),
    # Incomplete layers kept tensors whose memory the source had overwritten: k and q had the values of v.
    "load_weights from one buffer": (
        lambda s: s.model.load_weights(from_one_buffer(s.new.items())),
        everything,
    ),
    "reload of an iterator over one buffer": (
        lambda s: s.iterate(from_one_buffer(s.some("layers.0."))),
        block,
    ),
    "transfer in chunks from one buffer": (
        lambda s: s.send([pair] for pair in from_one_buffer(s.some("layers.0."))),
        block,
    ),
    "load_weights, one by one": (
        lambda s: [s.model.load_weights([pair]) for pair in s.some("layers.0.")],
        block,
    ),
    "load_weights of q and its bias": (
        lambda s: s.model.load_weights(s.some("layers.0.self_attn.q_proj")),
        q_proj,
    ),
    "transfer in chunks": (
        lambda s: s.transfer(*([pair] for pair in s.some("layers.0."))),
        block,
    ),
    "norm in place": (lambda s: s.parameter(NORM).data.mul_(2), doubled_norm),
    "norm in kernel format": (
        lambda s: s.iterate(doubled_norm(s.old, s.new).items(), is_checkpoint_format=False),
        doubled_norm,
    ),
    "norm by load_state_dict": (
        lambda s: s.model.load_state_dict(doubled_norm(s.old, s.new), strict=False),
        doubled_norm,
    ),
}


@pytest.mark.parametrize("name", EFFECTIVE)
def test_what_takes_effect_answers_as_bf16_vllm_with_these_weights(
    name: str, changing: Served, expected: dict[str, Any]
) -> None:
    EFFECTIVE[name][0](changing)
    after = changing.ask()
    assert after != changing.answers
    assert after == expected[name]


# Damage of a copy of the checkpoint, and words of its error. True: found before anything is changed.
SPOILT: dict[str, tuple[Callable[[Path], Any], str, bool]] = {
    "without a norm": (
        lambda path: tiny_models.edit(path, lambda tensors: tensors.pop(NORM)),
        f"{NORM}.* {AS_BEFORE}",
        True,
    ),
    "without k_proj": (
        lambda path: tiny_models.edit(path, lambda t: t.pop(f"{ATTENTION}.k_proj.weight")),
        f"{QKV}: [0-9]+ of [0-9]+ weights.* {AS_BEFORE}",
        True,
    ),
    "with another shape": (
        lambda path: tiny_models.edit(path, lambda t: t.update(shape(f"{O_PROJ}.weight", 3, 3))),
        rf"{O_PROJ}\.weight \[3, 3\]: could not be loaded .*{AS_BEFORE}",
        True,
    ),
    "with twice the rows": (
        lambda path: tiny_models.edit(path, lambda t: t.update({K: torch.cat([t[K]] * 2)})),
        rf"k_proj.weight \[256, 256\]: 65536 weights; expected 32768, as many .*{AS_BEFORE}",
        True,
    ),
    "with one block too many": (
        lambda path: tiny_models.edit(path, lambda t: t.update(shape("model.layers.2.mlp.up_proj.weight", 8, 8))),
        rf"layers\.2\.mlp\.up_proj.*{AS_BEFORE}",
        True,
    ),
    "truncated": (
        lambda path: os.truncate(path / "model.safetensors", 100_000),
        "",  # safetensors' words, or ours
        True,
    ),
    "no folder": (lambda path: path.rename(path.with_name("away")), "", True),
}  # fmt: skip


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which the name of each layer is added when it is encoded."""
    names: list[str] = []
    replace_weight = PackedMethod._replace_weight

    def watched(method: PackedMethod, *args: Any) -> None:
        names.append(method.name)
        replace_weight(method, *args)

    monkeypatch.setattr(PackedMethod, "_replace_weight", watched)
    return names


def as_dfloat11(source: Path, path: Path, spoil: bool = False) -> Path:
    """Write a checkpoint in the official format; with `spoil`, damage the codes of its last transformer block."""
    compress(open_source(source), path, workers=1)
    if spoil:
        stored = open_checkpoint(path).units["model.layers.1"].fields["encoded_exponent"]
        with stored.file.open("r+b") as file:
            file.seek(stored.begin + stored.num_bytes // 3)
            file.write(b"\xff" * (stored.num_bytes // 3))
    return path


def assert_refused(running: Served, path: Path, words: str, error: Any = Exception) -> None:
    before, source = running.bits(), running.worker.vllm_config.model_config.model
    with pytest.raises(error, match=words):
        running.reload(weights_path=str(path))
    after = running.bits()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert running.ask() == running.answers
    assert running.worker.vllm_config.model_config.model == source


@pytest.mark.parametrize(("spoil", "words", "is_seen_before"), SPOILT.values(), ids=SPOILT)
def test_spoilt_checkpoint_is_refused_and_the_engine_goes_on(
    spoil: Callable[[Path], Any],
    words: str,
    is_seen_before: bool,
    running: Served,
    encoded: list[str],
    tmp_path: Path,
) -> None:
    # Bug caught: half of a checkpoint was loaded before the other half was found missing.
    path = shutil.copytree(running.second, tmp_path / "model")
    spoil(path)
    assert_refused(running, path, words)
    assert bool(encoded) != is_seen_before


def test_damaged_unit_is_found_on_the_way_and_undone(
    running: Served, encoded: list[str], tmp_path: Path
) -> None:
    path = as_dfloat11(running.second, tmp_path / "model", spoil=True)
    assert_refused(running, path, "", FormatError)
    assert encoded


def test_whole_dfloat11_checkpoint_takes_effect(
    changing: Served, expected: dict[str, Any], tmp_path: Path
) -> None:
    changing.reload(weights_path=str(as_dfloat11(changing.second, tmp_path / "model")))
    assert changing.ask() == expected["reload of a path"]
