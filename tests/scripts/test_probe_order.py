"""The script that compares the order of additions, rehearsed in Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def test_rehearsal_compares_every_kind_and_writes_what_it_prints(tmp_path: Path) -> None:
    output = tmp_path / "order.json"
    command = [
        sys.executable,
        ROOT / "scripts/probe_order.py",
        "--device",
        "cpu",
        "--output",
        output,
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    rows = json.loads(output.read_text())["rows"]
    assert len(rows) == len(run.stdout.splitlines())
    assert {row["kind"] for row in rows} == {"gaussian", "cancelling"}
    assert all(row["row 0 of one row"] == 0 for row in rows)
    # NumPy adds in an order of its own; the rows that cancel must show it.
    assert any(row["in order"] for row in rows if row["kind"] == "cancelling")


def test_steps_of_the_fused_product_get_neighbouring_columns_in_the_order_for_it() -> None:
    code = (
        "import sys; sys.path[:0] = ['scripts', '.']\n"
        "from bench.kernels.order import fused_order\n"
        "print(fused_order(128).tolist())"
    )
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT, env=env
    )
    assert run.returncode == 0, run.stderr
    order = torch.tensor(json.loads(run.stdout))
    assert order.sort().values.tolist() == list(range(128))
    # As the kernel takes them: [block, group of a thread, step, ...], four weights of each thread a step.
    taken = order.view(2, 4, 4, 4).transpose(1, 2).reshape(8, 16)
    assert [sorted(step.tolist()) for step in taken] == [
        list(range(16 * i, 16 * i + 16)) for i in range(8)
    ]
