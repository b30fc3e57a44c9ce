"""The placeholder of a compressed layer's weight: reading its shape, dtype or device works, all else raises."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.integration.layers.placeholder import WeightPlaceholder, decoded_by_detach

NAME = "model.layers.3.mlp.down_proj"
SENTENCE = (
    rf"^{NAME}: .* held compressed; nothing was read or changed\. To change it, .* reload_weights"
)
OTHER = torch.ones(4, 6, dtype=torch.bfloat16)

Operation = Callable[[Any], Any]


@pytest.fixture
def weight() -> WeightPlaceholder:
    return placeholder()


def placeholder(name: str = NAME) -> WeightPlaceholder:
    return WeightPlaceholder(name, (4, 6), torch.device("cpu"), OTHER.clone)


class Layer(torch.nn.Module):
    """A module with a compressed weight and a norm."""

    def __init__(self, weight: Parameter) -> None:
        super().__init__()
        self.norm = Parameter(torch.ones(6, dtype=torch.bfloat16), requires_grad=False)
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.weight.dtype).to(self.weight.device) * self.weight.shape[0]


def set_data(weight: Any) -> None:
    weight.data = OTHER


def set_item(weight: Any) -> None:
    weight.data[...] = OTHER


def multiply_in_place(weight: Any) -> None:
    weight *= 2


WRITES: dict[str, Operation] = {
    "data.mul_": lambda w: w.data.mul_(2),
    "data.copy_": lambda w: w.data.copy_(OTHER),
    "copy_ under no_grad": torch.no_grad()(lambda w: w.copy_(OTHER)),
    "data =": set_data,
    "data[...] =": set_item,
    "fill_": lambda w: w.fill_(0),
    "detach().zero_": lambda w: w.detach().zero_(),
    "*=": multiply_in_place,
    "narrow": lambda w: w.data.narrow(0, 0, 2).copy_(OTHER[:2]),
    "view": lambda w: w.data.view(-1).index_copy_(0, torch.tensor([0]), OTHER[0, :1]),
    "_foreach_mul_": lambda w: torch._foreach_mul_([torch.ones(2), w], 2),
    "_foreach_copy_": lambda w: torch._foreach_copy_([w], [OTHER]),
    "out=": lambda w: torch.add(OTHER, OTHER, out=w),
    "aten": lambda w: torch.ops.aten.copy_.default(w, OTHER),
    "set_": lambda w: w.set_(OTHER),
    "init": torch.nn.init.normal_,
    "grad =": lambda w: setattr(w, "grad", OTHER),
    "of another layer": lambda w: w.data.copy_(placeholder()),
    "weight_loader": lambda w: w.weight_loader(w, OTHER, "q"),
    "load_qkv_weight": lambda w: w.load_qkv_weight(loaded_weight=OTHER, shard_id="q"),
    "load_row_parallel_weight": lambda w: w.load_row_parallel_weight(OTHER),
    "vector_to_parameters": lambda w: torch.nn.utils.vector_to_parameters(torch.ones(24), [w]),
}
READS: dict[str, Operation] = {
    "arithmetic": lambda w: OTHER * w,
    "linear": lambda w: torch.nn.functional.linear(OTHER, w),
    "==": lambda w: w == OTHER,
    "index": lambda w: w[0],
    "transpose": lambda w: w.T,
    "copied elsewhere": lambda w: OTHER.clone().copy_(w),
    "float": lambda w: w.float(),
    "another device": lambda w: w.to("meta"),
    "another dtype": lambda w: Layer(w).half(),
    "clone": lambda w: w.clone(),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "torch.save": lambda w: torch.save(Layer(w).state_dict(), io.BytesIO()),
    "numpy": lambda w: w.numpy(),
    "data_ptr": lambda w: w.data_ptr(),  # NCCL writes to it
    # torch does not call __torch_function__ for these; they gave NaN.
    "torch.tensor": torch.tensor,
    "Tensor": torch.Tensor,
    "as_subclass": lambda w: w.as_subclass(torch.Tensor),
    "Tensor.as_subclass": lambda w: torch.Tensor.as_subclass(w.data, torch.Tensor),
    "_make_subclass": lambda w: torch.Tensor._make_subclass(torch.Tensor, w),
    "untyped_storage": lambda w: w.untyped_storage(),  # sharded_state saves it
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_write_raises_a_sentence_with_the_layer_and_the_way_that_works(
    write: Operation, weight: WeightPlaceholder
) -> None:
    # Bug caught: writes to an empty tensor, which were lost without an error.
    with pytest.raises(UnsupportedError, match=SENTENCE):
        write(weight)


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_read_of_values_raises_the_same_sentence(
    read: Operation, weight: WeightPlaceholder
) -> None:
    with pytest.raises(UnsupportedError, match=f"{SENTENCE}.*dequantize_weight"):
        read(weight)


def test_swap_with_another_tensor_is_refused_by_torch(weight: WeightPlaceholder) -> None:
    with pytest.raises(RuntimeError, match="weakref"):
        torch.utils.swap_tensors(weight, Parameter(OTHER, requires_grad=False))


def test_looks_like_the_bf16_weight(weight: WeightPlaceholder) -> None:
    assert isinstance(weight, Parameter)
    assert (weight.shape, weight.dtype, weight.device) == (OTHER.shape, OTHER.dtype, OTHER.device)
    assert (weight.size(1), weight.dim(), weight.numel(), len(weight)) == (6, 2, 24, 4)
    assert not weight.requires_grad
    assert weight.grad is None
    assert str(weight) == f"WeightPlaceholder({NAME}: [4, 6], held compressed)"
    assert weight in {weight}
    assert not weight.is_pinned()
    assert weight.is_same_size(OTHER)


def test_module_calls_that_change_nothing_work(weight: WeightPlaceholder) -> None:
    layer = Layer(weight)
    layer.to("cpu").bfloat16().eval().requires_grad_(False).zero_grad()
    assert layer.weight is weight
    assert layer.state_dict()["weight"] is weight
    assert weight.data is weight
    weight.data = weight.data  # as torch.nn.Module.to does
    weight.data.copy_(weight)  # as a reload ends
    layer.weight = Parameter(weight.data, requires_grad=False)
    assert layer.weight is weight


def test_equals_nothing_but_itself(weight: WeightPlaceholder) -> None:
    # Bug caught: two empty tensors counted as equal, so a draft model got the target's embeddings.
    other = placeholder("another")
    assert torch.equal(weight, weight)
    assert not torch.equal(weight.cpu(), other.cpu())
    assert not torch.equal(OTHER, weight)


def test_checksums_of_vllm_are_those_of_the_bf16_weight(weight: WeightPlaceholder) -> None:
    with decoded_by_detach():
        assert torch.equal(weight.detach(), OTHER)
    assert weight.detach() is weight


def test_compiled_code_may_look_at_it(weight: WeightPlaceholder) -> None:
    compiled = torch.compile(Layer(weight), backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 4, dtype=torch.bfloat16))


def test_write_past_all_guards_does_not_go_unseen(weight: WeightPlaceholder) -> None:
    with (
        torch._C.DisableTorchFunctionSubclass(),
        pytest.raises(UnsupportedError, match=SENTENCE),
    ):
        weight.mul_(2)
