"""Every code block of the documentation runs: Python, and commands that call lamina.

Of a page all blocks run in order, in one folder. Commands are made small (`blocks.small`); those of `blocks.PARSED` are
held against the options that exist. Blocks that cannot run here say so above themselves: `<!-- not run: why -->`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import blocks
import lamina
from lamina.data import cached

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))
}
SLOW = {  # page -> why it is not in `make test`
    "docs/methods/deeper_models.md": "a ResNet-101 is followed through, and ten rounds are trained",
    "docs/tutorials/own-model-and-data.md": "a whole walk from an empty folder to a report",
}
METHODS_SHOWN = ("fedavg", "fedlama", "fedluar")
NOT_RUN = {  # page -> how many of its blocks are not run; each says why above itself
    "docs/conditions.md": 1,  # a trace of the reader's
    "docs/deployment.md": 3,
}
BEFORE = {  # page -> what its reader has run already
    "docs/verify.md": ["lamina run quickstart"],
    "docs/report.md": [f"lamina run quickstart name=fashion-mnist-cnn method={name}" for name in METHODS_SHOWN],
}
FETCHED = ("cifar10", "hapt", "fashion_mnist", "mnist", "shakespeare", "covertype")


def given(page: str) -> dict[str, Any]:
    """What a page's blocks take from the reader."""
    data = lamina.data.digits(clients=4, partition="iid")
    match page:
        case "docs/client-state.md":
            return {"lamina": lamina, "model": lambda: lamina.models.mlp((64, 10)), "data": small(data)}
        case "docs/wire-format.md":
            tree = {"weight": torch.arange(300.0)}
            return {"update": tree, "model": lamina.wire.schema_of(tree), "key": b"k" * 32, "loss": 0.5, "t": 3}
    return {}


def small(data: lamina.ClientData) -> lamina.ClientData:
    return data.subset([0, 1])


def fewer_rounds(code: str) -> str:
    """fed.fit(100, ...) of a page is two rounds of a test."""
    return re.sub(r"(\.(?:fit|run)\((?:rounds=)?)(?:[3-9]|\d{2,})\b", r"\g<1>2", code)


def pages() -> list[Any]:
    """Those with blocks; what is made from the program (reference/) is tested where it is made."""
    found = [
        page
        for page, text in PAGES.items()
        if any(block.language == "python" or blocks.commands(block) for block in blocks.blocks(text))
        and not page.startswith("docs/reference/")
    ]
    return [pytest.param(page, marks=pytest.mark.slow) if page in SLOW else page for page in found]


@pytest.mark.parametrize("page", pages())
@pytest.mark.filterwarnings("ignore")
def test_every_block_of_a_page_runs(page: str, tmp_path: Path) -> None:
    text = PAGES[page]
    if page not in SLOW:
        text = fewer_rounds(text)
    code = "\n".join(block.text for block in blocks.blocks(text) if block.language == "python")
    lacking = [name for name in FETCHED if f"data.{name}(" in code and not cached(name)]
    if lacking:
        pytest.skip(f"{lacking[0]} is not in the cache: `lamina data fetch {lacking[0]}`")
    (tmp_path / "exp.toml").write_text('preset = "quickstart"\nrounds = 2\n')
    with blocks.elsewhere(tmp_path):
        for command in BEFORE.get(page, []):
            blocks.run_command(command.split())
        ran = list(blocks.run(page, text, given(page)))
    assert ran


def test_blocks_that_are_not_run_say_why_and_are_counted() -> None:
    marked = {
        page: [block.mark for block in blocks.blocks(text) if block.mark.startswith("not run")]
        for page, text in PAGES.items()
    }
    counted = {page: len(marks) + PAGES[page].count(blocks.SKIPPED) for page, marks in marked.items()}
    assert {page: n for page, n in counted.items() if n} == NOT_RUN
    assert all(re.fullmatch(r"not run: .{10,}", mark) for marks in marked.values() for mark in marks)


def test_slow_pages_exist() -> None:
    assert set(SLOW) <= PAGES.keys()


@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith("docs/reference/")])
def test_toml_of_a_page_is_a_config(page: str, tmp_path: Path) -> None:
    """What a page shows as a file fits the schema that editors use."""
    import tomllib

    jsonschema = pytest.importorskip("jsonschema")
    from lamina.explain import schema

    shown = [block.text for block in blocks.blocks(PAGES[page]) if block.language == "toml"]
    if not shown:
        return
    validator = jsonschema.Draft7Validator(schema.made())
    for text in shown:
        validator.validate(tomllib.loads(text))


# ---- the harness itself


def test_blocks_are_found_with_their_language_and_mark() -> None:
    text = (
        "# a\n\n```python\nx = 1\n```\n\n<!-- not run: no such thing -->\n```\n$ lamina run x\n```\n\n"
        "    lamina list runs\n\n`lamina run y`\n"
    )
    found = blocks.blocks(text)
    assert [(block.language, block.text, block.mark) for block in found] == [
        ("python", "x = 1", ""),
        ("", "$ lamina run x", "not run: no such thing"),
        ("", "lamina list runs", ""),
        ("", "lamina run y", ""),
    ]
    assert blocks.commands(found[1]) == [["lamina", "run", "x"]]


def test_a_command_that_does_not_exist_is_found() -> None:
    with pytest.raises(blocks.Failed, match="exit code 2"):
        blocks.run_command(["lamina", "run", "quickstart", "phy=3"])
    with pytest.raises(Exception, match="--nodez"):
        blocks.run_command(["lamina", "flower", "rehearse", "quickstart", "--nodez", "2"])


def test_commands_are_made_small() -> None:
    assert blocks.small(["lamina", "run", "quickstart", "rounds=40"])[3:] == ["rounds=2", "engine=loop"]
    assert blocks.small(["lamina", "resume", "x", "rounds=40"])[-1] == "rounds=4"
    assert blocks.small(["lamina", "verify", "RUN"]) == ["lamina", "verify", "latest"]
