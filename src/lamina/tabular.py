"""A table for other programs: Markdown, LaTeX, comma-separated values."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from lamina.terminal import Column

_UNSEEN = (  # blanks, control characters, what says how to set others
    "\\s\\x00-\\x1f\\x7f-\\x9f\\xad\\u061c\\u180e\\u200b-\\u200f\\u202a-\\u202e\\u2060-\\u206f\\ufeff\\ufff9-\\ufffb"
)
# where a spreadsheet that begins cells there would take what follows for a formula
_FORMULA = re.compile(f"(^|[;|\t\r\n])(?=[{_UNSEEN}]*[=+\\-@\uff1d\uff0b\uff0d\uff20])|^(?=[\t\r\n])")
_APART = re.compile('[,;|"\t\r\n]')  # some spreadsheets begin a cell at one of these
_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
    "[": "{[}", "*": "{*}",  # behind the end of a row these would be its options
}  # fmt: skip


def markdown(columns: Sequence[Column]) -> list[str]:
    lines = [[c.title for c in columns], *zip(*(c.cells for c in columns), strict=True)]
    texts = ["| " + " | ".join(map(_marked, cells)) + " |" for cells in lines]
    return [texts[0], "|" + "".join(" --- |" if c.left else " ---: |" for c in columns), *texts[1:]]


def _marked(text: str) -> str:
    """Within its cell, and neither a picture nor HTML."""
    return re.sub(r"[\\|<]|(?<=!)\[", lambda found: f"\\{found[0]}", _seen(text))


def _plain(text: str) -> str:
    """On one line, with single blanks."""
    return " ".join(_seen(text).split())


def _seen(text: str) -> str:
    return re.sub(f"[{_UNSEEN}]", " ", text)


def latex(columns: Sequence[Column], bold: Collection[tuple[int, int]] = (), notes: Iterable[str] = ()) -> list[str]:
    """A tabular with the rules of the package booktabs.

    Args:
        bold: cells, as (column, row).
        notes: comments below the table.
    """

    def line(cells: Iterable[str]) -> str:
        return "  " + " & ".join(cells) + r" \\"

    def shown(i: int, row: int) -> str:
        cell = escaped(columns[i].cells[row])
        return rf"\textbf{{{cell}}}" if (i, row) in bold else cell

    rows = range(len(columns[0].cells))
    return [
        r"% \usepackage{booktabs}",
        r"\begin{tabular}{" + "".join("l" if c.left else "r" for c in columns) + "}",
        r"  \toprule",
        line(escaped(c.title) for c in columns),
        r"  \midrule",
        *(line(shown(i, row) for i in range(len(columns))) for row in rows),
        r"  \bottomrule",
        r"\end{tabular}",
        *(f"% {_plain(note)}" for note in notes),
    ]


def escaped(text: str) -> str:
    """As LaTeX sets it letter by letter."""
    return re.sub(r"[\\~^±&%$#_{}\[*]", lambda found: _LATEX.get(found[0], f"\\{found[0]}"), _plain(text))


def commas(rows: Iterable[Mapping[str, Any]], keys: Sequence[str]) -> str:
    """Numbers with all their digits; lists separated by blanks; nothing for None."""
    lines = [[inert(key) for key in keys], *([_cell(row.get(key)) for key in keys] for row in rows)]
    return "".join((",".join(map(_quoted, cells)) or '""') + "\r\n" for cells in lines)  # as in RFC 4180


def _quoted(cell: Any) -> str:
    text = str(cell)
    return '"' + text.replace('"', '""') + '"' if _APART.search(text) else text


def inert(text: str) -> str:
    """A text that no spreadsheet takes for a formula: behind an apostrophe, where it or a part of it begins so."""
    return _FORMULA.sub(r"\1'", text)


def _cell(value: Any) -> Any:
    match value:
        case None:
            return ""
        case bool() | int() | float():
            return value
        case dict():
            return inert(" ".join(f"{key}={_said(inner)}" for key, inner in value.items()))
        case list() | tuple():
            return inert(" ".join(map(_said, value)))
    return inert(str(value))


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
