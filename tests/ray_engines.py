"""Start real vLLM engines whose ranks are Ray workers, on two Ray nodes that share this machine.

Also a script, for a separate process: python ray_engines.py RUNS.json ANSWERS.json
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engines import Answers, ask, engine

# For Ray a GPU is only a number, and one rank takes one; vLLM does not look for a real device.
NODE: dict[str, Any] = dict(num_cpus=1, num_gpus=1, object_store_memory=100 << 20)


def install_platform(folder: Path) -> None:
    """Write a plugin into `folder` that makes vLLM's CPU platform usable with Ray.

    vLLM's CPU platform does not name the resource by which Ray counts ranks, so vLLM refuses: "current platform cpu
    does not support ray". Nothing else is missing. Every process with `folder` on its path finds the plugin.
    """
    (folder / "cpu_for_ray.py").write_text(PLATFORM)
    record = folder / "cpu_for_ray-0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: cpu_for_ray\nVersion: 0\n")
    (record / "entry_points.txt").write_text(
        "[vllm.platform_plugins]\ncpu_for_ray = cpu_for_ray:name\n"
    )


PLATFORM = """
from vllm.platforms.cpu import CpuPlatform


class CpuPlatformForRay(CpuPlatform):
    ray_device_key = "GPU"


def name():
    return "cpu_for_ray.CpuPlatformForRay"
"""


@contextmanager
def two_nodes() -> Iterator[None]:
    """Start two Ray nodes, each with room for one rank, and end them."""
    import ray
    from ray.cluster_utils import Cluster

    head = {**NODE, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, connect=True, head_node_args=head)
    try:
        cluster.add_node(**NODE)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def answers(model: Path, **settings: Any) -> Answers:
    """Return the answers of a new engine on `model`, after checking that its ranks are on different nodes."""
    from ray.util import placement_group_table, remove_placement_group

    with engine(model, distributed_executor_backend="ray", **settings) as llm:
        group = llm.llm_engine.vllm_config.parallel_config.placement_group
        nodes = placement_group_table(group)["bundles_to_node_id"].values()
        assert len(set(nodes)) == len(nodes) == 2
        given = ask(llm)
    remove_placement_group(group)  # vLLM keeps it, and the next engine would wait for its resources
    return given


def main(runs: str, result: str) -> None:
    with two_nodes():
        given = [
            answers(Path(run.pop("model")), **run) for run in json.loads(Path(runs).read_text())
        ]
    Path(result).write_text(json.dumps(given))


if __name__ == "__main__":
    main(*sys.argv[1:])
