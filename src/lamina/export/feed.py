"""What sinks are fed: the committed rows of a run, and what is said of it once."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lamina.errors import StorageError
from lamina.folder import read_environment, read_info

Layers = Sequence[Mapping[str, Any]]
_LOGS = ("metrics.jsonl", "layers.jsonl")
_TOLD = ("method_repr", "uplink", "downlink", "data", "partition", "clients", "cohort", "parameters", "seed", "engine")


class Described(NamedTuple):
    """Of a run, once."""

    experiment: str
    name: str
    identity: str  # of this run, wherever its folder is moved
    settings: dict[str, Any]


def described(folder: Path) -> Described:
    info, here = read_info(folder), folder.resolve()
    try:
        config = read_environment(folder).get("config")
    except StorageError:
        config = None
    settings = {**(config or {}), **{key: info[key] for key in _TOLD if key in info}, "rounds": info["rounds"]}
    identity = hashlib.sha256(f"{info.get('started')} {info['initial_sha256']} {here.name}".encode()).hexdigest()
    return Described(here.parent.name, here.name, identity[:16], settings)


def rounds(
    folder: Path, until: Mapping[str, int], since: Mapping[str, int] | None = None
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """A row of metrics.jsonl with the rows of its layers, for each round between these lengths of the logs.

    Raises:
        StorageError: E404.
    """
    start = since or {}
    metrics, layers = (lines(folder / log, start.get(log, 0), until.get(log, 0)) for log in _LOGS)
    by_round = itertools.groupby(layers, lambda row: row["round"])
    ahead = next(by_round, None)
    for row in metrics:
        own = []
        if ahead is not None and ahead[0] == row["round"]:
            own = list(ahead[1])
            ahead = next(by_round, None)
        yield row, own


def lines(path: Path, start: int, end: int) -> Iterator[dict[str, Any]]:
    """The rows between two lengths of a log. Raises StorageError E404."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            while file.tell() < end:
                row: dict[str, Any] = json.loads(file.readline())
                yield row
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} is damaged: {error}", code="E404", where=str(path.parent)) from error


def scalars(row: Mapping[str, Any], layers: Layers) -> dict[str, float]:
    """All numbers of a round by one name each: accuracy, metrics/auc, layers/conv1.weight/divergence."""
    named = {key: value for key, value in row.items() if key not in ("round", "metrics")}
    named |= {f"metrics/{key}": value for key, value in (row.get("metrics") or {}).items()}
    for layer in layers:
        named |= {f"layers/{layer['layer']}/{key}": value for key, value in layer.items() if key != "round"}
    return {key: float(value) for key, value in named.items() if isinstance(value, int | float)}
