"""Texts for a terminal, and words that are close to others."""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Iterable, Sequence

_WIDEST = 100  # columns of running text, however wide the terminal is


def paragraphs(text: str, width: int | None, indent: str = "  ") -> list[str]:
    """Markdown as plain text: paragraphs and lists are wrapped; code, tables and what is set off stay as they are."""
    lines: list[str] = []
    for block in re.split(r"\n[ \t]*\n", plain(text).strip("\n")):
        rows = block.splitlines()
        as_is = any(row.startswith((" ", "|", "```")) for row in rows)
        if lines:
            lines.append("")
        if as_is:
            lines += [f"{indent}{row}".rstrip() for row in rows if not row.startswith("```")]
        else:
            items = re.split(r"\n(?=- )", block)
            lines += [line for item in items for line in wrapped(item, width, indent)]
    return lines


def wrapped(text: str, width: int | None, indent: str = "  ") -> list[str]:
    """One paragraph. A word that is longer than the line stays whole."""
    room = _WIDEST if width is None else min(width, _WIDEST)
    return textwrap.wrap(
        " ".join(text.split()),
        room,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def fields(pairs: Sequence[tuple[str, str]], width: int | None) -> list[str]:
    """``label  text`` lines, the text wrapped beside its label; below it, where the labels are long."""
    span = min(max(len(label) for label, _ in pairs), 24) + 4
    lines: list[str] = []
    for label, text in pairs:
        body = wrapped(text, width, " " * span)
        head = f"  {label}"
        if body and len(head) + 2 <= span:
            lines.append(head.ljust(span) + body[0].lstrip())
            lines += body[1:]
        else:
            lines += [head, *body]
    return lines


def plain(text: str) -> str:
    """Without links, comments and the marks of literals of reST."""
    text = re.sub(r"<!--.*?-->\n*", "", text, flags=re.DOTALL)
    text = re.sub(r"\[([^\]\n]+)\]\([^)\n]+\)", r"\1", text)
    return text.replace("``", "`") if "```" not in text else text


def close(word: str, known: Iterable[str]) -> list[str]:
    """Up to three that are like it, without regard to case; a dotted name also by its last part."""
    ranked: dict[str, float] = {}
    for name in known:
        ways = {name.lower(), name.lower().rpartition(".")[2]} if "." not in word else {name.lower()}
        ranked[name] = max(difflib.SequenceMatcher(None, word.lower(), way).ratio() for way in ways)
    best = sorted(ranked, key=lambda name: -ranked[name])
    return [name for name in best[:3] if ranked[name] >= max(0.6, ranked[best[0]] - 0.1)]
