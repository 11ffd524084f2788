"""Parquet files as tables, by pyarrow (extra `parquet`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lamina.data.tables import Choose, Table, no_file
from lamina.errors import DataError


def read(file: str | Path, choose: Choose) -> Table:
    """The chosen columns; rows are counted from 0.

    Raises:
        DataError: E218 no parquet, E219 without pyarrow, E221 no such file, E222 a column.
    """
    path = Path(file)
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(
            "parquet files are read by pyarrow, which is not installed",
            code="E219",
            where=str(path),
            remedy="pip install 'lamina[parquet]', or save the table as CSV",
        ) from error
    if not path.is_file():
        raise no_file(path)
    try:
        with ParquetFile(path) as stored:
            wanted = choose(stored.schema_arrow.names)
            table = stored.read(columns=[*wanted])
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"not a parquet file: {error}", code="E218", where=str(path)) from error
    return Table(
        str(path),
        {name: _values(table.column(name)) for name in wanted},
        table.num_rows,
        lambda row: f"{path}, row {row}",
    )


def _values(column: Any) -> Any:
    """An array of numbers where there are only numbers, else a list in which None is a gap."""
    import pyarrow

    kind = column.type
    number = pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind)
    return column.to_numpy() if number and not column.null_count else column.to_pylist()
