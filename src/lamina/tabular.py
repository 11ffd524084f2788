"""A table for other programs: Markdown, LaTeX, comma-separated values."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from lamina.terminal import Column

_FORMULA = "=+-@\t\r\n\uff1d\uff0b\uff0d\uff20"  # what a spreadsheet takes a cell for that begins so
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}


def markdown(columns: Sequence[Column]) -> list[str]:
    lines = [[c.title for c in columns], *zip(*(c.cells for c in columns), strict=True)]
    texts = ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines]
    return [texts[0], "|" + "".join(" --- |" if c.left else " ---: |" for c in columns), *texts[1:]]


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
        *(f"% {' '.join(note.split())}" for note in notes),
    ]


def escaped(text: str) -> str:
    """As LaTeX sets it letter by letter."""
    return re.sub(
        r"[\\~^±&%$#_{}]", lambda found: _LATEX.get(found[0], f"\\{found[0]}"), " ".join(text.split()) or text
    )


def commas(rows: Iterable[Mapping[str, Any]], keys: Sequence[str]) -> str:
    """Numbers with all their digits; lists separated by blanks; nothing for None."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)  # lines end as in RFC 4180, so that a lone end of line in a text is quoted
    writer.writerow([inert(key) for key in keys])
    writer.writerows([_cell(row.get(key)) for key in keys] for row in rows)
    return text.getvalue()


def inert(text: str) -> str:
    """A text that no spreadsheet takes for a formula: behind an apostrophe, where it begins like one."""
    return f"'{text}" if text.lstrip(" ")[:1] in tuple(_FORMULA) else text


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
