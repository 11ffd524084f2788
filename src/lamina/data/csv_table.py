"""CSV files as tables, by the standard library: UTF-8, with a header, read in blocks of rows."""

from __future__ import annotations

import csv
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lamina.data.tables import Choose, Table, no_file, numbers
from lamina.errors import DataError

BLOCK = 20_000  # rows whose cells are texts at the same time


def read(file: str | Path, choose: Choose, delimiter: str = ",") -> Table:
    """The chosen columns: float64 arrays of those that hold numbers, lists of texts of the others.

    Raises:
        DataError: E211 an empty file, E215 a line with more or fewer cells, E218 no CSV or no UTF-8, E221 no such file,
            E222 a column, E223 a cell.
    """
    path = Path(file)
    lines = array("q")
    pending: list[list[str]] = []
    found: dict[str, list[Any]] = {}

    def place(row: int) -> str:
        return f"{path}:{lines[row]}"

    try:
        with path.open(encoding="utf-8-sig", newline="") as text:
            rows = csv.reader(text, delimiter=delimiter, skipinitialspace=True, strict=True)
            header = [name.strip() for name in next(rows, [])]
            _check_header(header, path, delimiter)
            wanted = choose(header)
            at = {name: header.index(name) for name in wanted}
            texts: dict[str, str] = {}  # equal cells are one text

            def flush() -> None:
                first = len(lines) - len(pending)
                for name, numeric in wanted.items():
                    cells = [row[at[name]] for row in pending]
                    if numeric:
                        found.setdefault(name, []).append(numbers(cells, name, lambda row: place(first + row)))
                    else:
                        found.setdefault(name, []).extend(texts.setdefault(cell, cell) for cell in cells)
                pending.clear()

            for cells in rows:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise DataError(
                        f"{len(cells)} cells, the header has {len(header)}",
                        code="E215",
                        where=f"{path}:{rows.line_num}",
                        remedy="a cell that holds the delimiter stands between double quotes",
                    )
                pending.append(cells)
                lines.append(rows.line_num)
                if len(pending) == BLOCK:
                    flush()
            flush()
    except FileNotFoundError as error:
        raise no_file(path) from error
    except OSError as error:
        raise no_file(path, error.strerror or "cannot be read") from error
    except UnicodeDecodeError as error:
        raise DataError("not UTF-8 text", code="E218", where=str(path), remedy="save it as UTF-8") from error
    except csv.Error as error:
        raise DataError(f"not CSV: {error}", code="E218", where=f"{path}:{rows.line_num}") from error
    columns = {name: np.concatenate(found[name]) if numeric else found[name] for name, numeric in wanted.items()}
    return Table(str(path), columns, len(lines), place)


def by(delimiter: str) -> Callable[[Any, Choose], Table]:
    """`read` with another delimiter."""
    return lambda file, choose: read(file, choose, delimiter)


def _check_header(header: list[str], path: Path, delimiter: str) -> None:
    if not header:
        raise DataError("an empty file", code="E211", where=str(path), remedy="the first line names the columns")
    twice = [name for i, name in enumerate(header) if name in header[:i]]
    if twice:
        message = f"the header names {twice[0]!r} twice"
        raise DataError(message, code="E222", where=f"{path}:1", remedy="every column needs a name of its own")
    other = next((mark for mark in ";\t|" if mark in header[0]), None)
    if len(header) == 1 and other is not None and other != delimiter:
        message = f"one column, {header[0]!r}"
        raise DataError(message, code="E222", where=f"{path}:1", remedy=f"delimiter={other!r} seems to be meant")
