"""Tables: columns of cells with their places, and how cells become numbers, names and classes.

Nothing is guessed: an empty cell, a NaN or a label outside the classes is refused, with its file and line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lamina.errors import DataError, meant

_SHOWN = 12  # names or values in a message
_LARGEST = float(np.finfo(np.float32).max)  # numbers become float32
_WHOLE = re.compile(r"(-?(?:0|[1-9]\d*))(?:\.0*)?")  # and no leading zeros: "007" is a text

Header = Sequence[str]
Choose = Callable[[Header], Mapping[str, bool]]  # of each column that is wanted, whether it holds numbers


class Table(NamedTuple):
    """The columns that were asked for.

    Args:
        source: file or data set, for messages.
        columns: by name; an array with rows along its first axis, or a list of values.
        rows: how many.
        place: where a row (counted from 0) stands, for messages.
        known: by column, all values that it can have, where the source says so.
        called: by column, what the values of `known` are called, where they are numbers.
        plain: numbers become float32; else arrays keep their dtype, as whoever stored them chose it.
    """

    source: str
    columns: dict[str, Any]
    rows: int
    place: Callable[[int], str]
    known: Mapping[str, Sequence[str]] = {}
    plain: bool = True
    called: Mapping[str, Sequence[str]] = {}


Read = Callable[[Any, Choose], Table]


def joined(source: str, tables: Sequence[Table]) -> Table:
    """Their rows, one table after the other; all of them have the same columns."""
    ends = np.cumsum([table.rows for table in tables])

    def place(row: int) -> str:
        which = int(np.searchsorted(ends, row, side="right"))
        return tables[which].place(row - int(ends[which]) + tables[which].rows)

    first = tables[0]
    columns: dict[str, Any] = {}
    for table in tables:
        if table.columns.keys() != first.columns.keys():
            lacking = sorted(table.columns.keys() ^ first.columns.keys())[0]
            message = f"column {lacking!r} is only in one of this and {first.source}"
            raise DataError(message, code="E222", where=table.source, remedy="name the columns of x with x=[...]")
    for name, values in first.columns.items():
        if not isinstance(values, np.ndarray):
            columns[name] = [value for table in tables for value in table.columns[name]]
            continue
        for table in tables:
            other = table.columns[name]
            if other.dtype != values.dtype or other.shape[1:] != values.shape[1:]:
                raise DataError(
                    f"{name!r}: an example is {other.dtype} {list(other.shape[1:])}, in {first.source} "
                    f"{values.dtype} {list(values.shape[1:])}",
                    code="E215",
                    where=table.source,
                    remedy="bring all examples to one shape and dtype",
                )
        columns[name] = np.concatenate([table.columns[name] for table in tables])
    return Table(source, columns, int(ends[-1]), place, first.known, first.plain, first.called)


# ---- cells


def numbers(values: Sequence[Any], column: str, place: Callable[[int], str]) -> NDArray[np.float64]:
    """Raises DataError E223 for the first cell that is no finite number."""
    try:
        found = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        found = np.array(math.nan)
    if found.ndim and bool((np.abs(found) <= _LARGEST).all()):
        return found
    for row, value in enumerate(values):
        try:
            number = np.asarray(value, dtype=np.float64)
        except (TypeError, ValueError):
            raise _unusable(value, column, place(row)) from None
        if not bool((np.abs(number) <= _LARGEST).all()):
            raise _unusable(value, column, place(row))
    raise DataError(f"column {column!r}: lists of different lengths", code="E215", where=place(0))


def finite(values: NDArray[Any], column: str, place: Callable[[int], str]) -> NDArray[Any]:
    """The same array. Raises DataError E223 for NaN and infinity."""
    if values.dtype.kind in "fc" and not bool(np.isfinite(values).all()):
        row = int((~np.isfinite(values)).reshape(len(values), -1).any(1).argmax())
        one = values[row].reshape(-1)
        raise _unusable(one[~np.isfinite(one)][0], column, place(row))
    return values


def names(values: Iterable[Any], column: str, place: Callable[[int], str]) -> list[str]:
    """As texts, whole numbers without a fraction of zero. Raises DataError E223 where there is none."""
    seen: dict[Any, str] = {}
    found = []
    for row, value in enumerate(values):
        if isinstance(value, list | dict):
            raise _unusable(value, column, place(row), "one value")
        name = seen.get(value)
        if name is None:
            name = "" if value is None or value != value else str(value).strip()
            if not name:
                raise _unusable(value, column, place(row))
            whole = _WHOLE.fullmatch(name)
            name = seen[value] = whole[1] if whole and not isinstance(value, bool) else name
        found.append(name)
    return found


def ordered(found: Collection[str]) -> list[str]:
    """Each once: as numbers where all are whole, else as texts."""
    once = set(found)
    return sorted(once, key=int) if all(_WHOLE.fullmatch(name) for name in once) else sorted(once)


def positions(
    values: Sequence[str], allowed: Sequence[str], what: str, place: Callable[[int], str], remedy: str
) -> NDArray[np.int64]:
    """Of each value among the allowed ones. Raises DataError E224, naming them."""
    at = {name: i for i, name in enumerate(allowed)}
    found = np.fromiter((at.get(value, -1) for value in values), dtype=np.int64, count=len(values))
    if len(found) and int(found.min()) < 0:
        row = int(found.argmin())
        message = f"{what} {values[row]!r}: expected one of {listed(allowed)}"
        raise DataError(message, code="E224", where=place(row), remedy=remedy)
    return found


# ---- errors


def listed(names: Sequence[str]) -> str:
    return ", ".join(map(str, names[:_SHOWN])) + (f", ... ({len(names)})" if len(names) > _SHOWN else "")


def no_column(name: str, header: Header, source: str) -> DataError:
    close = meant(name, header)
    known = f"columns: {listed(header)}"
    return DataError(
        f"there is no column {name!r}", code="E222", where=source, remedy=f"{close}  {known}" if close else known
    )


def no_file(path: object, reason: str = "no such file") -> DataError:
    return DataError(
        f"{path}: {reason}",
        code="E221",
        remedy="a path is relative to the current folder; Path(__file__).parent / NAME is beside your own file",
    )


def _unusable(value: Any, column: str, where: str, expected: str = "a finite number") -> DataError:
    empty = value is None or (isinstance(value, str) and not value.strip())
    if empty:
        said, remedy = "is empty", "fill it in or drop the row; no value is guessed"
    else:
        shown = " ".join(str(value).split())
        said = f"holds {shown[:40]!r}, expected {expected}"
        remedy = "write numbers like 3.5; leave the column out of x=, or name it in categorical="
        if shown.lower() in ("nan", "inf", "-inf"):
            said, remedy = f"holds {shown}, expected {expected}", "repair the value or drop the row"
    return DataError(f"column {column!r} {said}", code="E223", where=where, remedy=remedy)
