"""scripts/rl_loop.py: weights of a real trainer in a running engine answer as a fresh BF16 engine on them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "rl_loop.py"
STEP = re.compile(
    r"^step (\d): reward [\d.]+, .* pushed (\d+) tensors, (\d+) bytes of BF16, in [\d.]+ s$", re.M
)

# The same loop, but every push loses the first tensor that it was given.
_LOSSY = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import rl_loop
receive = rl_loop.Receiver.receive
rl_loop.Receiver.receive = lambda self, source, is_whole: receive(self, source[1:], is_whole)
sys.exit(rl_loop.main(sys.argv[1:]))
"""


def loop(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.mark.engine
@pytest.mark.on_demand
def test_pushed_weights_answer_as_a_fresh_engine_on_the_trained_checkpoint() -> None:
    done = loop(str(SCRIPT))
    assert done.returncode == 0, done.stderr[-4000:]
    (whole, part) = [tuple(map(int, found)) for found in STEP.findall(done.stdout)]
    assert whole == (1, 39, 6574592)  # all of models/tiny
    assert part[0] == 2
    assert 0 < part[1] < 39
    assert 0 < part[2] < 6574592
    assert re.findall(r"^step (\d): equal: tokens and log-prob", done.stdout, re.M) == ["1", "2"]


@pytest.mark.engine
@pytest.mark.alone
@pytest.mark.on_demand
def test_two_ranks_take_pushed_weights_from_a_file() -> None:
    done = loop(str(SCRIPT), "--tensor-parallel-size", "2")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count(": equal: ") == 2


@pytest.mark.engine
@pytest.mark.on_demand
def test_a_push_that_loses_a_tensor_is_noticed() -> None:
    # Bug caught: a comparison that cannot fail.
    done = loop("-c", _LOSSY, "--steps", "1")
    assert done.returncode == 1, done.stderr[-4000:]
    assert "step 1: DIFFERENT: tokens and log-probabilities" in done.stdout


def test_bad_input_ends_in_a_sentence(tmp_path: Path) -> None:
    done = loop(str(SCRIPT), str(tmp_path))
    assert done.returncode == 2
    assert f"{tmp_path}: no config.json there; expected a folder" in done.stderr
