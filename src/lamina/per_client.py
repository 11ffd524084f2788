"""Files with a row or more for each client: CSV, with a column `client` that holds its name."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator
from pathlib import Path

from lamina.errors import ConfigError, expect


def rows(
    path: Path, names: Collection[str], key: str, columns: Collection[str], needed: Collection[str] = ()
) -> Iterator[tuple[str, str, dict[str, str]]]:
    """(where it is, client, its other columns) of each row, in the file's order; an empty cell is an absent one.

    Args:
        names: of all clients.
        key: the configuration key that names the file.
        columns: that may be there beside `client`.
        needed: those of them that must be.

    Raises:
        ConfigError: E103, a file that cannot be read, other columns, a client that is not one.
    """
    where = f"{key}, {path}"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            found, titles = list(reader), set(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read: {error}", code="E103", where=key) from error
    fine = {"client", *needed} <= titles <= {"client", *columns}
    expect(fine, f"expected the columns {', '.join(('client', *columns))}", code="E103", where=where)
    everyone = set(names)
    for number, row in enumerate(found, start=2):
        at, client = f"{where}:{number}", row.pop("client")
        expect(client in everyone, f"no client {client!r}", code="E103", where=at)
        extra = None in row  # where DictReader puts the cells beyond the last column
        expect(not extra, "more cells than columns", code="E103", where=at)
        yield at, client, {title: cell for title, cell in row.items() if cell}
