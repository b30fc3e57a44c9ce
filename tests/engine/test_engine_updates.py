"""Weights that are written into a running engine: each way takes effect exactly, or raises and changes nothing."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from conftest import Checkpoint
from engines import ask, bf16_answers, engine
from safetensors.torch import load_file
from torch.nn import Parameter
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.model_executor.model_loader import reload

from vllm_dfloat.checkpoint.reader import open_checkpoint
from vllm_dfloat.convert.compress import compress
from vllm_dfloat.convert.source import open_source
from vllm_dfloat.errors import FormatError, UnsupportedError
from vllm_dfloat.integration.layers.method import DESC, PackedMethod
from vllm_dfloat.integration.layers.placeholder import WeightPlaceholder

pytestmark = pytest.mark.engine

ATTENTION = "model.layers.0.self_attn"
QKV, O_PROJ, DOWN = f"{ATTENTION}.qkv_proj", f"{ATTENTION}.o_proj", "model.layers.0.mlp.down_proj"
NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens"
MLP = "model.layers.1.mlp"
K = f"{ATTENTION}.k_proj.weight"
AS_BEFORE = "All weights are as before"
HOW = "held compressed; nothing was read or changed. To change it, .*reload_weights"

Tensors = dict[str, torch.Tensor]
Pairs = list[tuple[str, torch.Tensor]]
Change = Callable[[Tensors, Tensors], Tensors]  # (first checkpoint, second) -> what is written

NUM_TOKENS = 4


@dataclass
class TransferInfo:
    """What a trainer sends: nothing to begin with, then weights."""

    weights: Pairs = field(default_factory=list)


class InProcessTransfer(WeightTransferEngine):
    """A backend of vLLM's weight transfer whose trainer is this process; the life cycle is that of the NCCL backend."""

    init_info_cls = update_info_cls = TransferInfo

    def init_transfer_engine(self, init_info: TransferInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        reload.initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: TransferInfo) -> None:
        self.model.load_weights(update_info.weights)

    def finish_weight_update(self) -> None:
        reload.finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


class Served:
    """A running engine and two checkpoints: the one it was started from, and another one."""

    def __init__(self, llm: Any, first: Path, second: Path) -> None:
        self.llm = llm
        self.first, self.second = first, second
        self.worker = llm.llm_engine.model_executor.driver_worker.worker
        self.model = self.worker.model_runner.get_model()
        self.old: Tensors = load_file(first / "model.safetensors")
        self.new: Tensors = load_file(second / "model.safetensors")
        self.answers = self.ask()

    def ask(self) -> Any:
        return ask(self.llm, num_tokens=NUM_TOKENS)

    @torch.no_grad()  # vLLM itself leaves it out where it copies a kernel's format
    def reload(self, **arguments: Any) -> None:
        self.llm.collective_rpc("reload_weights", kwargs=arguments)

    def iterate(self, pairs: Any, **arguments: Any) -> None:
        self.reload(weights_iterator=iter(pairs), **arguments)

    def transfer(self, *chunks: Pairs) -> None:
        self.send(chunks)

    def send(self, chunks: Iterable[Pairs]) -> None:
        """Send chunks of weights from start to finish; after a failure nothing more is sent."""
        self.llm.collective_rpc("start_weight_update")
        for chunk in chunks:
            self.llm.collective_rpc("update_weights", kwargs={"update_info": {"weights": chunk}})
        self.llm.collective_rpc("finish_weight_update")

    def some(self, part: str) -> Pairs:
        return [(name, tensor) for name, tensor in self.new.items() if part in name]

    def layer(self, name: str) -> Any:
        return self.model.get_submodule(name)

    def parameter(self, name: str) -> Any:
        return dict(self.model.named_parameters())[name]

    def bits(self) -> Tensors:
        """Return every weight as it is served."""
        found = {}
        for name, parameter in self.model.named_parameters():
            layer = self.layer(name.rpartition(".")[0])
            is_packed = isinstance(parameter, WeightPlaceholder)
            value = layer.quant_method.dequantize_weight(layer) if is_packed else parameter
            found[name] = value.detach().clone()
        return found


@pytest.fixture(scope="module")
def both(bf16_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Any:
    second = tiny_models.save("qwen2", tmp_path_factory.mktemp("second") / "model", seed=7)
    return bf16_checkpoint("qwen2"), second


@pytest.fixture(scope="module")
def expected(both: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what BF16 vLLM answers with each set of changes; asked before, since an engine that ends takes vLLM's
    process groups from one that runs."""
    changes = {change for _, change in EFFECTIVE.values()}
    answers = {
        change: changed_answers(both, change, tmp_path_factory.mktemp("edited"))
        for change in changes
    }
    return {name: answers[change] for name, (_, change) in EFFECTIVE.items()}


@pytest.fixture(scope="module")
def running(both: tuple[Path, Path], expected: dict[str, Any]) -> Iterator[Served]:
    # A model with biases; one of its fused layers stays BF16.
    settings = dict(
        additional_config={"dfloat11": {"ignore": [f"{MLP}.gate_proj", f"{MLP}.up_proj"]}},
        weight_transfer_config=WeightTransferConfig(backend="in_process"),
    )
    WeightTransferEngineFactory.register_engine("in_process", InProcessTransfer)
    with engine(both[0], quantization="dfloat11", **settings) as llm:
        yield Served(llm, *both)


@pytest.fixture
def changing(running: Served) -> Iterator[Served]:
    """Give the engine to a test that changes its weights, and change them back."""
    yield running
    running.reload(weights_path=str(running.first))
    assert running.ask() == running.answers


def changed_answers(both: tuple[Path, Path], change: Change, folder: Path) -> Any:
    """Return what BF16 vLLM answers with the first checkpoint and some other tensors."""
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


def fails_after(pairs: Pairs) -> Iterator[tuple[str, torch.Tensor]]:
    yield from pairs
    raise OSError("the trainer is gone")


def from_one_buffer(pairs: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield pairs whose tensors lie in the same memory, one after the other."""
    pairs = list(pairs)
    buffer = torch.empty(max(tensor.numel() for _, tensor in pairs), dtype=torch.bfloat16)
    for name, tensor in pairs:
        yield name, buffer[: tensor.numel()].view(tensor.shape).copy_(tensor)
    buffer.fill_(torch.nan)


def larger(served: Served, name: str, dim: int) -> Pairs:
    """Return a tensor with as much again beside it."""
    return [(name, torch.cat([served.new[name]] * 2, dim).contiguous())]


def write_norm_then(served: Served, name: str) -> Pairs:
    return [(NORM, served.new[NORM]), (name, torch.zeros(4))]


def put_parameter(served: Served) -> None:
    served.layer(O_PROJ).weight = Parameter(served.new[f"{O_PROJ}.weight"], requires_grad=False)


def replace(served: Served) -> None:
    from vllm.model_executor.utils import replace_parameter

    replace_parameter(served.layer(O_PROJ), "weight", served.new[f"{O_PROJ}.weight"])


def shape(name: str, *size: int) -> Pairs:
    return [(name, torch.zeros(*size, dtype=torch.bfloat16))]


# name: (what is done, the error, its words)
Refused = tuple[Callable[[Served], Any], type[BaseException], str]
REFUSED: dict[str, Refused] = {
    "reload of q alone": (
        lambda s: s.iterate(s.some("layers.0.self_attn.q_proj")),
        UnsupportedError,
        rf"{QKV}: .* weights arrived",
    ),
    "reload of a part of a layer that is BF16": (
        lambda s: s.iterate(s.some("layers.0.") + s.some(f"{MLP}.gate_proj")),
        UnsupportedError,
        rf"{MLP}\.gate_up_proj: [0-9]+ of [0-9]+ weights arrived; .* {AS_BEFORE}",
    ),
    "load_weights of a part of a layer that is BF16, which a CPU packs": (
        lambda s: s.model.load_weights(s.some(f"{MLP}.gate_proj")),
        UnsupportedError,
        f"only a part of it was given, .* {AS_BEFORE}",
    ),
    "reload, the source raises": (
        lambda s: s.iterate(fails_after(s.some("layers.0."))),
        OSError,
        "the trainer is gone",
    ),
    "reload, another shape": (
        lambda s: s.iterate(s.some("layers.1.") + shape(f"{O_PROJ}.weight", 3, 3)),
        UnsupportedError,
        rf"{O_PROJ}.weight \[3, 3\]: could not be loaded .*{AS_BEFORE}",
    ),
    "reload, a norm of another shape": (
        lambda s: s.iterate([*s.some("layers.1."), (NORM, torch.zeros(3))]),
        UnsupportedError,
        rf"{NORM} \[3\]: could not be loaded .*{AS_BEFORE}",
    ),
    "reload, an unknown name": (
        lambda s: s.iterate(s.some("layers.1.") + shape("model.layers.7.mlp.up_proj.weight", 8, 8)),
        UnsupportedError,
        rf"layers\.7\.mlp\.up_proj\.weight \[8, 8\]: .*{AS_BEFORE}",
    ),
    "reload, a name twice": (
        lambda s: s.iterate(s.some(O_PROJ) + shape(f"{O_PROJ}.weight", 256, 256)),
        UnsupportedError,
        rf"{O_PROJ}\.weight: given twice",
    ),
    "load_weights, another shape": (
        lambda s: s.model.load_weights(s.some("layers.1.") + shape(f"{O_PROJ}.weight", 3, 3)),
        UnsupportedError,
        rf"{O_PROJ}.weight \[3, 3\]: could not be loaded .*{AS_BEFORE}",
    ),
    "load_weights, q with twice the rows": (
        lambda s: s.model.load_weights(larger(s, f"{ATTENTION}.q_proj.weight", 0)),
        UnsupportedError,
        rf"q_proj.weight \[512, 256\]: 131072 weights; expected 65536, as many .*{AS_BEFORE}",
    ),
    "load_weights, a bias of k with twice the rows": (
        lambda s: s.model.load_weights(larger(s, f"{ATTENTION}.k_proj.bias", 0)),
        UnsupportedError,
        rf"k_proj.bias \[256\]: 256 weights; expected 128, as many .*{AS_BEFORE}",
    ),
    "load_weights, down with twice the columns": (
        lambda s: s.model.load_weights(larger(s, f"{DOWN}.weight", 1)),
        UnsupportedError,
        rf"down_proj.weight \[256, 3072\]: 786432 weights; expected 393216, as many .*{AS_BEFORE}",
    ),
    "reload, gate of a layer that is BF16 with twice the rows": (
        lambda s: s.iterate(s.some("layers.0.") + larger(s, f"{MLP}.gate_proj.weight", 0)),
        UnsupportedError,
        rf"gate_proj.weight \[3072, 256\]: 786432 weights; expected 393216, as many .*{AS_BEFORE}",
    ),
    "load_weights, the source raises": (
        lambda s: s.model.load_weights(fails_after(s.some("layers.0."))),
        OSError,
        "the trainer is gone",
    ),
    "load_weights of a submodule": (
        lambda s: s.model.model.load_weights([("layers.0.self_attn.o_proj.weight", s.new[f"{O_PROJ}.weight"])]),
        UnsupportedError,
        f"{O_PROJ}: weight_loader on its weight, which is {HOW}",
    ),
    "transfer, another shape": (
        lambda s: s.transfer(s.some("layers.1."), shape(f"{O_PROJ}.weight", 3, 3)),
        UnsupportedError,
        rf"{O_PROJ}.weight \[3, 3\]: could not be loaded .*{AS_BEFORE}",
    ),
    "transfer that ends early": (
        lambda s: s.transfer(s.some("layers.1."), s.some("layers.0.self_attn.q_proj")),
        UnsupportedError,
        rf"{QKV}: .* weights arrived",
    ),
    "transfer that breaks off": (
        lambda s: s.transfer(s.some("layers.1."), fails_after(s.some("layers.0.self_attn.q_proj"))),
        OSError,
        "the trainer is gone",
    ),
    "kernel format": (
        lambda s: s.iterate(write_norm_then(s, f"{O_PROJ}.weight"), is_checkpoint_format=False),
        UnsupportedError,
        f"{O_PROJ}: weight in kernel format on its weight, which is {HOW}",
    ),
    "kernel format, a descriptor": (
        lambda s: s.iterate(write_norm_then(s, f"{O_PROJ}.{DESC}"), is_checkpoint_format=False),
        UnsupportedError,
        f"{O_PROJ}: {DESC} in kernel format on its weight, which is {HOW}",
    ),
    "param.weight_loader": (
        lambda s: s.parameter(f"{QKV}.weight").weight_loader(
            s.parameter(f"{QKV}.weight"), s.new[f"{ATTENTION}.q_proj.weight"], "q"
        ),
        UnsupportedError,
        f"{QKV}: weight_loader on its weight, which is {HOW}",
    ),
    "layer.weight_loader": (
        lambda s: s.layer(O_PROJ).weight_loader(s.parameter(f"{O_PROJ}.weight"), s.new[f"{O_PROJ}.weight"]),
        UnsupportedError,
        f"{O_PROJ}: .* on its weight, which is {HOW}",
    ),
    "layer.weight_loader_v2": (
        lambda s: s.layer(O_PROJ).weight_loader_v2(s.parameter(f"{O_PROJ}.weight"), s.new[f"{O_PROJ}.weight"]),
        UnsupportedError,
        f"{O_PROJ}: weight_loader on its weight, which is {HOW}",
    ),
    "embedding.weight_loader": (
        lambda s: s.layer(EMBEDDING).weight_loader(
            s.parameter(f"{EMBEDDING}.weight"), s.new[f"{EMBEDDING}.weight"]
        ),
        UnsupportedError,
        f"model.embed_tokens: .* on its weight, which is {HOW}",
    ),
    "named_parameters, mul_": (
        lambda s: s.parameter(f"{DOWN}.weight").data.mul_(2),
        UnsupportedError,
        f"{DOWN}: mul_ on its weight, which is {HOW}",
    ),
    "state_dict, copy_": (
        lambda s: s.model.state_dict()[f"{O_PROJ}.weight"].copy_(s.new[f"{O_PROJ}.weight"]),
        UnsupportedError,
        f"{O_PROJ}: copy_ on its weight, which is {HOW}",
    ),
    "load_state_dict": (
        lambda s: s.model.load_state_dict(
            {name: s.new[name] for name in (NORM, f"{O_PROJ}.weight")}, strict=False
        ),
        UnsupportedError,
        f"{O_PROJ}: load_state_dict on its weight, which is {HOW}",
    ),
    "load_state_dict, strict": (
        lambda s: s.model.load_state_dict({NORM: s.new[NORM]}),
        UnsupportedError,
        f"model.embed_tokens: load_state_dict on its weight, which is {HOW}",
    ),
    "load_state_dict of a layer": (
        lambda s: s.layer(O_PROJ).load_state_dict({"weight": s.new[f"{O_PROJ}.weight"]}, assign=True),
        UnsupportedError,
        f"{O_PROJ}: load_state_dict on its weight, which is {HOW}",
    ),
    "setattr": (put_parameter, UnsupportedError, f"{O_PROJ}: another parameter .* on its weight, which is {HOW}"),
    "replace_parameter": (replace, UnsupportedError, f"{O_PROJ}: .* on its weight, which is {HOW}"),
    "save_sharded_state": (
        lambda s: s.llm.collective_rpc("save_sharded_state", kwargs={"path": str(s.second / "sharded")}),
        UnsupportedError,
        f"untyped_storage on its weight, which is {HOW}",
    ),
    "reset_weights": (
        lambda s: s.llm.collective_rpc("reset_weights"),
        UnsupportedError,
        f"{EMBEDDING}: reset_weights on its weight, which is {HOW}",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("write", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_says_why_and_changes_nothing(
    write: Callable[[Served], Any], error: type[BaseException], words: str, running: Served
) -> None:
    # Bug caught: weights lost in silence; an engine that is dead after an update that failed.
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
    # Bug caught: all compressed layers had the checksum of nothing, so no change of them could be seen.
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


# name: (what is done, the tensors that change)
EFFECTIVE: dict[str, tuple[Callable[[Served], Any], Change]] = {
    "reload of a path": (lambda s: s.reload(weights_path=str(s.second)), everything),
    "reload of an iterator": (lambda s: s.iterate(s.new.items()), everything),
    "reload of one block": (lambda s: s.iterate(s.some("layers.0.")), block),
    "load_weights": (lambda s: s.model.load_weights(s.new.items()), everything),
    # Layers that wait for more kept the memory that their source filled again: k and q had the values of v.
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


# How a copy of the checkpoint is spoilt, and what is said of it. True: found before anything is changed.
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
    """Return a list that grows with the name of each layer that is encoded from here on."""
    names: list[str] = []
    replace_weight = PackedMethod._replace_weight

    def watched(method: PackedMethod, *args: Any) -> None:
        names.append(method.name)
        replace_weight(method, *args)

    monkeypatch.setattr(PackedMethod, "_replace_weight", watched)
    return names


def as_dfloat11(source: Path, path: Path, spoil: bool = False) -> Path:
    """Write a checkpoint in the official format; on request with damage in the codes of its last block."""
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
    # Bug caught: half a checkpoint was loaded before its other half was found missing.
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
