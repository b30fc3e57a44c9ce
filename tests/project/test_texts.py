"""Everything that READMEs, docs, comments and docstrings name exists, also after files move. The README stays short."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_dfloat import __version__

ROOT = Path(__file__).parents[2]
NAMED = re.compile(
    r"(?<![\w/.])((?:vllm_dfloat|kernels|scripts|tests|docs|codec|storage|dfloat11|checkpoint|convert|device|integration)"
    r"/[\w/]+\.(?:py|sh|md))\b"
)
# Paths in documents: also folders, files of any kind, and patterns of them.
PLACE = re.compile(
    r"(?<![\w/.<-])((?:vllm_dfloat|kernels|scripts|tests|docs|models|\.github)/[\w./*{},<>-]*|[A-Z]{4,}\.md\b|\w+\.toml\b)"
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def texts() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "*.md", "*.py", "*.sh", "*.toml", "*.yml", "*.yaml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("no repository here, only its files")
    return [ROOT / name for name in listed.stdout.splitlines() if not (ROOT / name).is_symlink()]


def test_every_path_that_a_text_names_exists() -> None:
    missing = [
        f"{file.relative_to(ROOT)}: {name}"
        for file in texts()
        if file.exists()
        for name in NAMED.findall(file.read_text())
        if not (ROOT / name).exists() and not (ROOT / "vllm_dfloat" / name).exists()
    ]
    assert missing == []


def test_the_readme_is_read_in_five_minutes() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1000


def test_wheels_and_the_newest_changes_are_of_this_version() -> None:
    wheels = {
        name
        for file in DOCUMENTS
        for name in re.findall(r"vllm_dfloat-(\d[\w.]*)-py3", file.read_text())
    }
    newest = re.search(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert wheels == {__version__}
    assert newest is not None
    assert newest.group(1) == __version__


def test_the_documents_are_those_that_these_tests_know() -> None:
    assert {"README.md", "CONTRIBUTING.md", "architecture.md"} <= {file.name for file in DOCUMENTS}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_every_file_and_folder_that_a_document_names_exists(document: Path) -> None:
    found = [name.rstrip(".,") for name in PLACE.findall(document.read_text())]
    missing = [name for name in found if "<" not in name and not any(ROOT.glob(name.rstrip("/")))]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_every_relative_link_of_a_document_leads_to_a_file_and_its_heading(document: Path) -> None:
    broken = []
    for link in LINK.findall(document.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, heading = link.partition("#")
        target = document.parent / name if name else document
        if not target.exists() or (heading and heading not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_every_document_can_be_reached_from_the_readme() -> None:
    # Bug caught: a document to which no link leads.
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        document = waiting.pop()
        reached.add(document)
        for link in LINK.findall(document.read_text()):
            target = (document.parent / link.partition("#")[0]).resolve()
            if target in DOCUMENTS and target not in reached:
                waiting.append(target)
    assert [file.name for file in DOCUMENTS if file not in reached] == []


def anchors(document: Path) -> set[str]:
    """Return the headings of a document in the form that links use."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def places() -> Iterator[tuple[str, str]]:
    """Yield (file, name in it) of the table "Where is ..." of docs/architecture.md."""
    section = (ROOT / "docs" / "architecture.md").read_text().split("## Where is")[1]
    for line in section.split("\n## ")[0].splitlines():
        file = ""
        for name in re.findall(r"`([^`]+)`", line.partition("|")[2].partition("|")[2]):
            if name.endswith(".py"):
                file = name
            else:
                yield file, name


def names_in(file: Path) -> set[str]:
    """Return the names that a module defines: functions, classes, their methods and fields, and constants."""
    names: set[str] = set()

    def walk(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    walk(node.body, f"{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names.update(prefix + target.id for target in targets if isinstance(target, ast.Name))  # fmt: skip

    walk(ast.parse(file.read_text()).body, "")
    return names


def test_what_the_architecture_says_to_be_somewhere_is_there() -> None:
    listed = list(places())
    missing = [
        f"{file}: {name}" for file, name in listed if name not in names_in(ROOT / (file or "."))
    ]
    assert len(listed) > 30
    assert missing == []
