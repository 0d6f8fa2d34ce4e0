"""The documents are true: links lead somewhere, paths exist, snippets run against a real server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml
from conftest import ROOT

from spatialscore_client.adapters import judge

SOURCES = [
    "benches",
    "clients",
    "deploy",
    "docs",
    "examples",
    "fuzz",
    "packaging",
    "proto",
    "scripts",
    "src",
    "tests",
    "training",
]
FOLDERS = ["clients", "deploy", "docs", "examples", "models", "samples", "training"]
PAGES = sorted(
    page
    for pages in [ROOT.glob("*.md"), *((ROOT / folder).rglob("*.md") for folder in FOLDERS)]
    for page in pages
    if not any(part.startswith(".") for part in page.relative_to(ROOT).parts)
)
# What a newcomer reads. The client's README is run by test_readme.py.
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LONGEST_README = 150


def blocks(page: Path, language: str, *, marked: bool = False) -> list[str]:
    """The fenced blocks of a language; only those under `<!-- run -->` where marked."""
    mark = "^<!-- run -->\n" if marked else "^"
    return re.findall(rf"{mark}```{language}\n(.*?)^```", page.read_text(), flags=re.M | re.S)


def snippets(language: str, *, marked: bool = False, pages: Sequence[Path] = GUIDES) -> list[object]:
    return [
        pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")
        for page in pages
        for number, block in enumerate(blocks(page, language, marked=marked))
    ]


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """The headings' names, as the forges make them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_exist_and_none_is_of_somebodys_machine(page: Path) -> None:
    text = page.read_text()
    named = re.findall(rf"`((?:{'|'.join(SOURCES)})/[\w./-]*)", text)
    assert not [name for name in named if not (ROOT / name).exists() and not (page.parent / name).exists()]
    assert not re.findall(r"(?<![\w.])/(?:home|root|work|Users)/\S+", text)


def test_the_readme_is_read_in_five_minutes() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= LONGEST_README


def test_every_guide_is_one_click_away() -> None:
    linked = (ROOT / "README.md").read_text()
    assert not [page.name for page in (ROOT / "docs").glob("*.md") if f"(docs/{page.name}" not in linked]


@pytest.mark.parametrize("block", snippets("json"))
def test_json_parses(block: str) -> None:
    json.loads(block)


@pytest.mark.parametrize("block", snippets("python"))
def test_python_runs(block: str, request: pytest.FixtureRequest) -> None:
    """Against the server of the README, or one of two models where a name stands for it."""
    if "import GRPOTrainer" in block:
        pytest.skip("test_adapters.py runs it where there is a checkout of Flow-Factory")
    servers = {"127.0.0.1:50051": "address", "scorer:50051": "two_models"}
    for target, fixture in servers.items():
        if target in block:
            block = block.replace(target, request.getfixturevalue(fixture))
    ran = subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("block", snippets("console", marked=True))
def test_commands_run(block: str, address: str, tmp_path: Path) -> None:
    """In an empty folder that has the binary and the samples where the checkout has them."""
    binary = tmp_path / "target/release/spatialscore"
    binary.parent.mkdir(parents=True)
    binary.symlink_to(os.environ["SPATIALSCORE_BINARY"])
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    commands = re.sub(r"^\$ ", "", block, flags=re.M)
    environment = {**os.environ, "SPATIALSCORE_TARGET": address}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    script = ["bash", "-euo", "pipefail", "-c", commands]
    ran = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def recipes(value: Any) -> Iterator[dict[str, Any]]:
    """The parts of a YAML that name a server."""
    if isinstance(value, dict) and "target" in value:
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from recipes(part)


@pytest.mark.parametrize("block", snippets("yaml", pages=[*GUIDES, ROOT / "clients/python/README.md"]))
def test_recipes_of_trainers_give_rewards(block: str, two_models: str) -> None:
    """With the keys that are ours."""
    # Those of the frameworks.
    theirs = {
        "_target_",
        "name",
        "reward_model",
        "weight",
        "batch_size",
        "async_reward",
        "num_workers",
        "path",
        "required",
    }
    for recipe in recipes(yaml.safe_load(block)):
        keys = {key: value for key, value in recipe.items() if key not in theirs} | {"target": two_models}
        made = judge.Judge.of(**keys).rewards("a panda", [ROOT / "samples/panda.right.png"])
        assert len(made.rewards) == 1 and made.rewards[0] != 0


def test_snippets_are_found() -> None:
    """So that a changed mark cannot leave all of them out."""
    assert len(snippets("console", marked=True)) >= 4
    assert len(snippets("python")) >= 6
    assert len(snippets("yaml")) >= 2
    assert len(snippets("json")) >= 1
