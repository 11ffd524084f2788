"""The site: what is made from the program is as the program is, every page has its place, nothing is broken."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
HTTP = re.compile(r"""(?:src|srcset|action)=["']?https?:|<link[^>]+href=["']?https?:|url\(["']?https?:|@import""")


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_what_the_program_says(generate: ModuleType) -> None:
    """If not: python docs/generate.py"""
    for name, text in generate.reference().items():
        assert (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8") == text, "python docs/generate.py"
    assert {path.name for path in (ROOT / "docs" / "reference").glob("*")} == set(generate.reference())


def navigated(nav: Any) -> list[str]:
    match nav:
        case str():
            return [nav]
        case dict():
            return [page for inner in nav.values() for page in navigated(inner)]
    return [page for inner in nav for page in navigated(inner)]


def test_every_page_has_a_place_in_the_navigation(generate: ModuleType) -> None:
    yaml = pytest.importorskip("yaml")
    nav = navigated(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    pages = {target for target in generate.pages().values() if target.endswith(".md")}
    listed = {page for page in pages if not page.startswith(("reference/codes/", "results/"))}
    assert sorted(nav) == sorted({*listed, "results/README.md"})


def test_links_become_those_of_the_site(generate: ModuleType) -> None:
    targets = {
        "docs/methods/a.md": "methods/a.md",
        "benchmarks/parity/b.md": "results/b.md",
        "src/lamina/explain/pages/E103.md": "reference/codes/E103.md",
    }
    text = "[t](../../benchmarks/parity/b.md#x) [s](../../src/lamina/federation.py) [w](https://a.b) [h](#here)"
    assert generate.linked(text, "docs/methods/a.md", targets) == "[t](../results/b.md#x) s [w](https://a.b) [h](#here)"
    back = generate.linked("[a](../../../../docs/methods/a.md)", "src/lamina/explain/pages/E103.md", targets)
    assert back == "[a](../../methods/a.md)"
    block = "```\n[t](../../benchmarks/parity/b.md)\n```\n"
    assert generate.linked(block, "docs/methods/a.md", targets) == block


def test_links_of_the_repository_lead_somewhere(generate: ModuleType) -> None:
    """As GitHub resolves them: relative to the file."""
    for source in generate.pages():
        if source.endswith(".md"):
            text = re.sub(r"^```.*?^```$", "", (ROOT / source).read_text(encoding="utf-8"), flags=re.M | re.S)
            for link in re.findall(r"(?<!!)\[[^\]]+\]\(([^)\s#]+)[^)\s]*\)", text):
                assert re.match(r"\w+:", link) or (ROOT / source).parent.joinpath(link).exists(), f"{source}: {link}"


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_asks_no_other_server(generate: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("material")
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    generate.assemble(tmp_path / "docs")
    (tmp_path / "mkdocs.yml").write_text(text.replace("build/", f"{tmp_path}/"), encoding="utf-8")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(tmp_path / "mkdocs.yml")]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=quiet)
    assert done.returncode == 0, done.stderr
    assert "WARNING -" not in done.stderr
    made = list((tmp_path / "site").rglob("*.html"))
    assert len(made) > 100
    for path in (*made, *(tmp_path / "site").rglob("*.css")):
        found = HTTP.search(path.read_text(encoding="utf-8"))
        assert found is None, f"{path.name}: {found and found[0]}"
