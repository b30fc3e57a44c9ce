"""Ranks end an update together: each learns of the others' failures, and none waits for one that will not come."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "agreeing_ranks.py"


def test_rank_that_waits_in_an_update_learns_why_another_does_not_come(tmp_path: Path) -> None:
    # Bug caught: a worker's code failed on one rank before it called reload_weights, and the other rank waited for it
    # for ever, or took the rank's next update for its part in this one.
    command = [sys.executable, str(SCRIPT), str(tmp_path)]
    subprocess.run(command, check=True, timeout=300)
    first, second = (json.loads((tmp_path / str(rank)).read_text()) for rank in range(2))
    reasons = [
        "done",
        "rank 1 left the call without taking part in the update (FileNotFoundError: no such checkpoint)",
        "done",
        "rank 1 did not come in 0.5 s",
        "rank 1 left the call without taking part in the update",
        "done",
    ]
    for said, reason in zip(first, reasons, strict=True):
        assert said.endswith(reason)
    assert second[:3] == ["done", "no such checkpoint", "done"]
    assert second[3].endswith("rank 1 did not come in 0.5 s")  # what it loaded late is undone too
    assert second[4:] == ["done", "done"]
