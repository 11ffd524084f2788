"""The methods' pages and the overview say what the committed tables say."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from lamina.recipes import RECIPES

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("publish", ROOT / "benchmarks" / "publish.py")
publish = importlib.util.module_from_spec(spec)
spec.loader.exec_module(publish)
PAGES = sorted(publish.PAGES.glob("*.md"))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_shows_the_tables_as_they_are(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert publish.page(text) == text, "run benchmarks/publish.py"


def test_the_overview_shows_the_tables_as_they_are() -> None:
    assert (publish.TABLES / "README.md").read_text(encoding="utf-8") == publish.overview()


def test_every_recipe_stands_on_a_page() -> None:
    named = {name for path in PAGES for found in publish.MARK.findall(path.read_text()) for name in found.split()}
    assert named == set(RECIPES)


def test_tables_name_no_folder_of_a_machine() -> None:
    for path in publish.TABLES.iterdir():
        assert not re.search(r'["\s(]/(home|root|tmp|work|Users)/', path.read_text(encoding="utf-8")), path.name
