"""Updates of layers without matrices: vLLM's loaders, its layerwise reload and real layers, without an engine."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from model_loads import loaded
from safetensors.torch import load_file
from vllm.model_executor.model_loader import reload

from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.integration.updating.update import updates_of

pytestmark = pytest.mark.engine

MIXER = "backbone.layers.0.mixer"  # a module of three vectors and some layers
VECTORS = ("A", "D", "dt_bias")


class Loaded:
    """A model and the tensors of its checkpoint."""

    def __init__(self, model: Any, path: Path) -> None:
        self.model, self.stored = model, load_file(path / "model.safetensors")
        self.mixer = model.get_submodule(MIXER)

    def vectors(self) -> list[torch.Tensor]:
        return [getattr(self.mixer, name).detach().clone() for name in VECTORS]

    def reload(self, *names: str) -> None:
        updates = updates_of(self.model)
        assert updates is not None
        with updates.undone_on_error():
            reload.initialize_layerwise_reload(self.model)
            self.model.load_weights((name, self.stored[name] * 2) for name in names)
            reload.finalize_layerwise_reload(self.model, updates._model_config)


@pytest.fixture(scope="module")
def mamba(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    path = tiny_models.save("mamba2", tmp_path_factory.mktemp("mamba2"))
    with loaded(path, quantization="dfloat11") as model:
        yield Loaded(model, path)


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, found, expected))


def test_layer_that_gets_one_parameter_and_not_another_is_refused(mamba: Loaded) -> None:
    # Bug caught: the other vectors were served from uninitialised memory.
    before = mamba.vectors()
    with pytest.raises(
        UnsupportedError, match=rf"{MIXER}: nothing arrived for A, dt_bias; .*before"
    ):
        mamba.reload(f"{MIXER}.D")
    assert same(mamba.vectors(), before)


def test_layer_that_gets_nothing_keeps_its_parameters(mamba: Loaded) -> None:
    before = mamba.vectors()
    mamba.reload("backbone.norm_f.weight")
    assert same(mamba.vectors(), before)


def test_load_weights_of_one_parameter_keeps_the_others(mamba: Loaded) -> None:
    a, d, bias = mamba.vectors()
    mamba.model.load_weights([(f"{MIXER}.D", mamba.stored[f"{MIXER}.D"] * 3)])
    assert same(mamba.vectors(), [a, d * 3, bias])


CONVOLUTION = f"{MIXER}.conv1d"


def test_update_reaches_a_buffer_that_is_a_view_of_a_weight(mamba: Loaded) -> None:
    # Bug caught: the mixer went on with the old weights of its convolution, which vLLM had packed and freed on a CPU.
    name = f"{CONVOLUTION}.weight"
    before = mamba.mixer.conv_weights.clone()
    assert torch.equal(before.view(-1), mamba.stored[name].view(-1))
    mamba.reload(name, f"{CONVOLUTION}.bias")
    assert torch.equal(mamba.mixer.conv_weights, before * 2)
    mamba.model.load_weights([(name, mamba.stored[name])])  # without its bias
    assert torch.equal(mamba.mixer.conv_weights, before)
    with pytest.raises(UnsupportedError, match="before"):
        mamba.reload(name, f"{CONVOLUTION}.bias", f"{MIXER}.D")
    assert torch.equal(mamba.mixer.conv_weights, before)


def test_updates_by_two_threads_both_take_effect(mamba: Loaded) -> None:
    # Bug caught: the second took part in the first one's reload; it failed, and the first, which had ended, was undone.
    first, second = f"{MIXER}.D", "backbone.norm_f.weight"
    matrix = f"{MIXER}.out_proj.weight"
    expected = {name: mamba.stored[name] * 2 for name in (first, second, matrix)}
    begun, entered, failed = threading.Event(), threading.Event(), []

    def of_first() -> Iterator[tuple[str, torch.Tensor]]:
        yield first, expected[first].clone()
        begun.set()
        entered.wait(0.3)  # as long as the other would need to come in

    def of_second() -> Iterator[tuple[str, torch.Tensor]]:
        entered.set()
        yield second, expected[second].clone()
        threads[0].join(10)
        yield matrix, expected[matrix].clone()

    def update(pairs: Iterator[tuple[str, torch.Tensor]]) -> None:
        try:
            mamba.model.load_weights(pairs)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=update, args=(p,)) for p in (of_first(), of_second())]
    threads[0].start()
    assert begun.wait(10)
    threads[1].start()
    for thread in threads:
        thread.join(30)
    assert not failed
    layer = mamba.mixer.out_proj
    assert torch.equal(layer.quant_method.dequantize_weight(layer), expected[matrix])
    for name in (first, second):
        assert torch.equal(mamba.model.get_parameter(name), expected[name])
