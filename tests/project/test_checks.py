"""The checks of a commit, local and on a forge: the hooks, the test command and the workflow agree."""

import re
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
HOOKS = [
    hook
    for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    for hook in [{"repo": repo["repo"], **hook} for hook in repo["hooks"]]
]
PACKAGE_OF = {
    "end-of-file-fixer": "pre-commit-hooks",
    "check-added-large-files": "pre-commit-hooks",
}


def test_the_hooks_are_those_that_ci_is_to_run() -> None:
    names = ["ruff", "ruff-format", "typos", "end-of-file-fixer", "check-added-large-files"]
    assert [hook["id"] for hook in HOOKS] == names
    assert "pre-commit run --all-files" in (ROOT / "scripts" / "test.sh").read_text()


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook["id"])
def test_a_hook_downloads_nothing_and_its_program_comes_with_the_test_extra(
    hook: dict[str, Any],
) -> None:
    # Bug caught: a hook from its own repository, which CI without a network cannot fetch.
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    packages = {re.split(r"[<>=!~;\[ ]", requirement)[0] for requirement in extras["test"]}
    program = hook["entry"].split()[0]
    assert (hook["repo"], hook["language"]) == ("local", "system")
    assert PACKAGE_OF.get(program, program) in packages
    assert shutil.which(program, path=str(Path(sys.executable).parent))


def test_the_workflow_runs_the_test_command_on_two_pythons_and_may_only_read() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert workflow["permissions"] == {"contents": "read"}
    assert "permissions" not in job
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12"]
    assert [step["run"] for step in job["steps"] if "run" in step] == ["scripts/test.sh"]
