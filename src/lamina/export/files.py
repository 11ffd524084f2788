"""A run as files for other programs: tables of its logs, its rounds for a text, its model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lamina.errors import StorageError
from lamina.export.feed import lines
from lamina.folder import Row, read_rows, standing, storing
from lamina.store.files import replace
from lamina.tabular import commas, latex, markdown
from lamina.terminal import Column, share, sizes

_SHOWN = 10  # rounds, of which the last is one


def as_csv(folder: Path, info: Mapping[str, Any], place: Path) -> list[Path]:
    """A file per log: metrics.csv, layers.csv, bytes.csv, and clients.csv where that is kept."""
    made: dict[str, bytes] = {}
    for log, length in info["lengths"].items():
        if log != "events.jsonl":
            rows = [_flat(row) for row in lines(folder / log, 0, length)]
            keys = list(dict.fromkeys(key for row in rows for key in row))
            made[f"{Path(log).stem}.csv"] = commas(rows, keys).encode()
    return _written(place, made)


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in row.items() if not isinstance(value, dict)}
    inner = ((key, value) for key, value in row.items() if isinstance(value, dict))
    return plain | {f"{key}.{name}": x for key, value in inner for name, x in value.items()}


def as_markdown(folder: Path, info: Mapping[str, Any], place: Path) -> list[Path]:
    return _written(place, {"rounds.md": _text(markdown(_columns(folder, info)))})


def as_latex(folder: Path, info: Mapping[str, Any], place: Path) -> list[Path]:
    return _written(place, {"rounds.tex": _text(latex(_columns(folder, info), notes=[str(info["method_repr"])]))})


def as_safetensors(folder: Path, info: Mapping[str, Any], place: Path) -> list[Path]:
    """The state_dict that the run ended with."""
    source = folder / "model.safetensors"
    try:
        with safe_open(source, "pt") as file:
            file.keys()
        blob = source.read_bytes()
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{folder} has no model that is whole: {error}" if source.exists() else f"{folder} has not ended: no model",
            code="E404",
            where=str(source),
            remedy="`lamina resume` goes on, and writes it at the end",
        ) from error
    return _written(place, {"model.safetensors": blob})


def _columns(folder: Path, info: Mapping[str, Any]) -> list[Column]:
    rows = read_rows(folder, info["lengths"]["metrics.jsonl"])
    step = max(1, -(-len(rows) // _SHOWN))
    shown = [row for row in rows if (row.round + 1) % step == 0 or row is rows[-1]]

    def numbers(of: Callable[[Row], float | None]) -> list[str]:
        return [share(of(row)) for row in shown]

    columns = [
        Column("round", [str(row.round) for row in shown]),
        Column("accuracy", numbers(lambda row: standing(row, info["personal"]))),
        Column("loss", numbers(lambda row: row.loss)),
        Column("train loss", numbers(lambda row: row.train_loss)),
        *(Column(name, [share((row.metrics or {}).get(name)) for row in shown]) for name in _metrics(shown)),
        Column("total up", sizes([row.total_up for row in shown])),
        Column("total down", sizes([row.total_down for row in shown])),
    ]
    return [column for column in columns if not shown or set(column.cells) != {"-"}]


def _metrics(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.metrics or {}))


def _text(table: Sequence[str]) -> bytes:
    return ("\n".join(table) + "\n").encode()


def _written(place: Path, made: Mapping[str, bytes]) -> list[Path]:
    with storing(place):
        place.mkdir(parents=True, exist_ok=True)
        for name, blob in made.items():
            replace(place / name, blob)
    return [place / name for name in made]


WRITERS: dict[str, Callable[[Path, Mapping[str, Any], Path], list[Path]]] = {
    "csv": as_csv,
    "latex": as_latex,
    "md": as_markdown,
    "safetensors": as_safetensors,
}
