"""The catalogue of codes: complete, of one form, and each page's example ends in its code."""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from pathlib import Path

import pytest

import blocks
import lamina
from lamina.errors import LaminaError, class_of
from lamina.explain import codes

SOURCE = Path(lamina.__file__).parent
CODE = re.compile(r"[EWGI]\d{3}")
ELSEWHERE = {  # code -> why its page cannot show it here; the page says so too
    "E302": "no error",
    "E305": "a machine that forbids connections to itself",
    "E311": "a Flower node that is stopped",
    "E313": "a Flower node that has lost its files",
    "E323": "a Flower node with other settings",
    "E330": "a Flower node that answers for others",
    "E331": "no error",
    "E332": "no error",
    "E333": "a letter that is sent again",
    "E334": "a node with another key",
    "E335": "two runs with one key",
    "E336": "a node that is started again",
    "E315": "a Flower node without its data",
    "E316": "Flower's programs, a port in use",
    "E406": "two processes",
    "E407": "a run that was made elsewhere",
}


@cache
def raised() -> dict[str, list[str]]:
    """Code -> places where the source has it as a value, not in a text about it."""
    found: dict[str, list[str]] = {}
    for path in SOURCE.rglob("*.py"):
        if path.parent.name == "explain":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and CODE.fullmatch(node.value):
                found.setdefault(node.value, []).append(f"{path.relative_to(SOURCE)}:{node.lineno}")
    return found


def test_every_code_that_is_raised_has_a_page() -> None:
    missing = {code: places[0] for code, places in raised().items() if code not in codes.names()}
    assert not missing, "write src/lamina/explain/pages/CODE.md"


def test_every_page_is_of_a_code_that_is_raised() -> None:
    assert not set(codes.names()) - raised().keys()


@pytest.mark.parametrize("code", codes.names())
def test_a_page_says_what_why_and_what_to_do(code: str) -> None:
    page = codes.page(code)
    assert len(page.title) <= 80
    assert not page.title.endswith(".")
    assert all(line == line.rstrip() and len(line) <= 120 for line in codes.source(code).splitlines())
    assert codes.source(code).endswith("\n")
    assert codes.source(code).count("```") % 2 == 0


def test_pages_without_a_running_example_are_few_and_say_why() -> None:
    bare = {code for code in codes.names() if "```" not in codes.page(code).example}
    assert bare == ELSEWHERE.keys()
    assert all(codes.page(code).example.startswith("Not reproduced: it takes") for code in bare)


def marked(code: str) -> object:
    slow = "<!-- slow -->" in codes.page(code).example
    return pytest.param(code, marks=pytest.mark.slow) if slow else code


@pytest.mark.parametrize("code", [marked(code) for code in codes.names() if code not in ELSEWHERE])
@pytest.mark.filterwarnings("ignore")
def test_the_example_of_a_page_ends_in_its_code(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "sklearn.datasets" in sys.modules:  # an example hides it
        monkeypatch.setitem(sys.modules, "sklearn.datasets", sys.modules["sklearn.datasets"])
    shown, caught = [], None
    with blocks.elsewhere(tmp_path, cache=tmp_path / "cache"):
        try:
            shown += [said for _, said in blocks.run(code, codes.page(code).example)]
        except LaminaError as error:
            caught = error
        except blocks.Failed as failure:
            shown.append(str(failure))
    if caught is not None:
        assert caught.code == code, caught
        assert isinstance(caught, class_of(code))
    else:
        assert code in "".join(shown)
        assert code[0] != "E" or f"exit code {int(code[1]) + 1}" in shown[-1]
