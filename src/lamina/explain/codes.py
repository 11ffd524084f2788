"""Codes: a page for each, pages/E103.md. Their first line is the title; the rest is the same for all of them."""

from __future__ import annotations

import importlib.resources
import re
from functools import lru_cache
from typing import NamedTuple

from lamina.explain.words import paragraphs, wrapped

KINDS = {
    "E1": "settings and what does not fit together (exit code 2)",
    "E2": "data (3)",
    "E30": "a run that cannot go on (4)",
    "E31": "clients and messages that are not used (4 where a run ends by it)",
    "E32": "messages of another form than what was asked for",
    "E33": "letters and answers that are not whose or when they say",
    "E34": "bytes that are not what the receiver's schema implies (4)",
    "E4": "the disk (5)",
    "W": "warnings of `lamina inspect`",
    "G": "guidance of `lamina inspect`",
    "I": "information of `lamina inspect`",
}
_FORM = re.compile(
    r"# (?P<code>[EWGI]\d{3})  (?P<title>[^\n]+)\n\n(?P<meaning>.+?)\n\n## Why\n\n(?P<why>.+?)\n\n## What to do\n\n"
    r"(?P<remedy>.+?)\n\n## Example\n\n(?P<example>.+)",
    re.DOTALL,
)


class Page(NamedTuple):
    code: str
    title: str
    meaning: str
    why: str
    remedy: str
    example: str  # Markdown: blocks that run and end in this error, or why that cannot be shown


@lru_cache(maxsize=1)
def names() -> tuple[str, ...]:
    """Every code that has a page."""
    folder = importlib.resources.files("lamina.explain") / "pages"
    return tuple(sorted(p.name.removesuffix(".md") for p in folder.iterdir() if p.name.endswith(".md")))


@lru_cache(maxsize=256)
def page(code: str) -> Page:
    """Raises ValueError for a page that has not the form of all pages."""
    found = _FORM.fullmatch(source(code))
    if found is None or found["code"] != code:
        raise ValueError(f"the page of {code} has not the form of all pages")
    return Page(**{name: text.strip() for name, text in found.groupdict().items()})


def source(code: str) -> str:
    """The page as it is written."""
    path = importlib.resources.files("lamina.explain") / "pages" / f"{code}.md"
    return path.read_text(encoding="utf-8")


def lines(page: Page, width: int | None) -> list[str]:
    return [
        f"  {page.code}  {page.title}",
        "",
        *paragraphs(page.meaning, width),
        "",
        "  why",
        *paragraphs(page.why, width, "    "),
        "",
        "  what to do",
        *paragraphs(page.remedy, width, "    "),
        "",
        "  example",
        *_example(page.example, width),
    ]


def _example(text: str, width: int | None) -> list[str]:
    """Code as it stands, so that it can be copied."""
    shown: list[str] = []
    for i, block in enumerate(re.split(r"^```\w*\n?", re.sub(r"<!--.*?-->\n*", "", text), flags=re.MULTILINE)):
        if i % 2:
            shown += ["", *(f"    {row}".rstrip() for row in block.rstrip().splitlines())]
        elif block.strip():
            shown += ["", *wrapped(block, width, "    ")]
    return shown[1:]
