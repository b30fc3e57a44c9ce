"""Products with experts that are not decoded, beside vLLM's own kernel: how the benchmark compares and times them."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm_experts
from tensor_cores import interpret_with_them
from vllm_experts import BLOCKS, Sorted

from vllm_dfloat.kernels.routed import Routed

pytestmark = pytest.mark.on_demand


class Interpreted:
    """vLLM's kernel in Triton's interpreter, in place of the one on a GPU."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def config(self, *shapes: Any) -> dict[str, int]:
        return dict(BLOCKS)

    def multiply(
        self, x: torch.Tensor, weight: torch.Tensor, routed: Routed, out: torch.Tensor, config: Any
    ) -> None:
        assert routed.ids is not None
        assert routed.num_padded is not None
        of = Sorted(routed.ids, routed.expert_of_block, routed.num_padded)
        parts = routed.top_k, routed.weights, None, config
        out.copy_(vllm_experts.multiply(self._kernel, x, weight, of, *parts))


@pytest.mark.parametrize("is_in_order", [True, False])
def test_bits_are_compared_with_vllm_and_both_are_timed(
    is_in_order: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.kernels import experts_fused
    from bench.kernels.held_experts import Held, Shape, weights_of
    from bench.kernels.timing import Bench

    interpret_with_them(monkeypatch)
    monkeypatch.setenv("VLLM_DFLOAT_BACKEND", "triton")
    monkeypatch.setattr(experts_fused, "TOKENS", [1, 5])
    monkeypatch.setattr(experts_fused, "FEW_EXPERTS", 2)
    kernel: Any = Interpreted(
        vllm_experts.load(tmp_path, as_written=not is_in_order).fused_moe_kernel
    )
    bench = Bench(torch.device("cpu"), 1, time.monotonic() + 600)
    shape = Shape(4, 128, 256, 1)
    experts_fused._compare(bench, "tiny", shape, kernel)
    told = [row["found"] for row in bench.rows]
    if not is_in_order:
        assert told[0].startswith("other bits at ['1 (16 a block)', '1 (64 a block)', '5 (16")
        return
    assert told == ["equal bits at all tokens"] * 2
    experts_fused._time(bench, "tiny", shape, Held("fast", weights_of(shape, bench.device)), kernel, 2)  # fmt: skip
    assert [row["name"] for row in bench.rows if "us" in row] == [
        "vLLM's kernel with BF16 experts",
        "without decoding, fast layout",
    ]
