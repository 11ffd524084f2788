"""A run folder as plain tables: lists, dictionaries and, for what there is per layer and round, arrays.

Only what is committed is read. What a run did not record is None or NaN here, never a guess.
"""

from __future__ import annotations

import contextlib
import json
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import nn

from lamina import checkpoint
from lamina.errors import LaminaError, StorageError
from lamina.folder import CLIENTS, Row, read_log
from lamina.layers import is_matrix, layer_table
from lamina.runs import Run

Grid: TypeAlias = NDArray[np.float64]  # [layers, rounds]; NaN where nothing was recorded

_SIDES = (32, 28, 64, 224, 16, 8, 128, 256)  # a fixed classifier runs on one size alone; fields do not depend on it


class Part(NamedTuple):
    """One trainable parameter. What the folder does not say is None."""

    name: str
    kind: str | None
    shape: tuple[int, ...] | None
    matrix: bool  # a weight tensor with two or more dimensions: what layer-wise methods schedule
    field: int | None  # receptive field behind it, in pixels of the input

    @property
    def numel(self) -> int | None:
        return None if self.shape is None else int(np.prod(self.shape, dtype=np.int64))

    @property
    def width(self) -> int | None:
        """Outputs of a weight tensor."""
        return self.shape[0] if self.matrix and self.shape else None


class Ledger(NamedTuple):
    """What was counted twice, and both counts in bytes."""

    what: str
    rows: int
    total: int
    spare: int = 0  # of the second, bytes that may be missing from the first

    @property
    def agrees(self) -> bool:
        return self.total - self.spare <= self.rows <= self.total


@dataclass
class Client:
    """One client over all rounds, as far as clients.jsonl was kept."""

    name: str
    examples: int
    rounds: list[int] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0


@dataclass(frozen=True)
class Tables:
    """Everything that the pages of one run are made of."""

    title: str
    run: Run
    environment: Mapping[str, Any]
    config: str | None  # config.toml as it is
    parts: Sequence[Part]
    columns: Mapping[str, Grid]  # of layers.jsonl
    ledger: Sequence[Ledger]
    sent: Mapping[str, Mapping[str, int]]  # direction -> layer or "_tree" -> bytes over all rounds and phases
    probe: Mapping[str, int]  # direction -> bytes before round 0
    clients: Sequence[Client] | None  # None: clients.jsonl was not kept
    split: Mapping[str, Any] | None
    events: Sequence[Mapping[str, Any]]

    @property
    def rows(self) -> list[Row]:
        return self.run.records

    @property
    def info(self) -> dict[str, Any]:
        return self.run.info

    @property
    def rounds(self) -> int:
        return len(self.run.records)

    @property
    def matrices(self) -> list[int]:
        """Positions of the weight tensors in `parts`, in model order: depth."""
        return [i for i, part in enumerate(self.parts) if part.matrix]

    def column(self, name: str) -> Grid:
        """NaN everywhere for a column that the run did not record."""
        return self.columns.get(name, np.full((len(self.parts), self.rounds), np.nan))

    def setting(self, key: str) -> Any:
        """A key of the config that fixes the result, e.g. "local.lr"; None without a config."""
        return self.environment.get("config", {}).get(key)

    @property
    def control_variates(self) -> str:
        """The keys that give this run control variates; they are exact under plain SGD only."""
        used = any(self.setting(f"local.{key}") for key in ("momentum", "weight_decay", "clip"))
        return "`method=scaffold" + (" method.approximate=true`" if used else "`")

    def label(self, number: int) -> str:
        """What a label is called: by its number where nothing names it, as in runs of before names were kept."""
        names = (self.split or {}).get("label_names") or []
        return str(names[number]) if number < len(names) else str(number)

    @property
    def methods(self) -> list[str]:
        return str(self.info["method"]).split("+")

    @property
    def command(self) -> str | None:
        """What was typed, as a shell would read it."""
        words = [str(word) for word in self.environment.get("argv") or ()]
        return shlex.join([Path(words[0]).name, *words[1:]]) if words else None


def read(run: Run, title: str | None = None) -> Tables:
    """Raises StorageError E404 for logs that cannot be read."""
    folder, lengths = run.path, run.info["lengths"]
    try:
        parts, columns = _layers(run)
        sent, probe, sums = _traffic(run, parts)
        clients, by_client = _clients(folder, lengths) if CLIENTS in lengths else (None, None)
        events = list(_log(folder, lengths, "events.jsonl"))
        split = _document(folder / "split.json")
        environment = _document(folder / "env.json") or {}
        config = folder / "config.toml"
        text = config.read_text(encoding="utf-8") if config.is_file() else None
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise StorageError(
            f"the logs of this run cannot be read: {error!r}",
            code="E404",
            where=str(folder),
            remedy=f"lamina verify {folder} names the file",
        ) from error
    return Tables(
        title or folder.name, run, environment, text, parts, columns, _ledger(run, sums, columns, by_client), sent,
        probe, clients, split, events,
    )  # fmt: skip


def _log(folder: Path, lengths: Mapping[str, int], name: str) -> Iterable[dict[str, Any]]:
    return read_log(folder / name, lengths[name]) if lengths.get(name) else ()


def _document(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    found = json.loads(path.read_bytes())
    return found if isinstance(found, dict) else None


# ---- layers


def _layers(run: Run) -> tuple[list[Part], dict[str, Grid]]:
    rounds = len(run.records)
    places: dict[str, int] = {}
    lines: dict[str, dict[int, NDArray[np.float64]]] = defaultdict(dict)
    for row in _log(run.path, run.info["lengths"], "layers.jsonl"):
        t = row["round"]
        i = places.setdefault(row["layer"], len(places))
        for name, value in row.items():
            if isinstance(value, int | float) and name != "round":
                line = lines[name].get(i)
                if line is None:
                    line = lines[name][i] = np.full(rounds, np.nan)
                line[t] = value
    nothing = np.full(rounds, np.nan)
    columns = {name: np.stack([own.get(i, nothing) for i in range(len(places))]) for name, own in lines.items()}
    return parts_of(run, list(places)), columns


def parts_of(run: Run, names: Sequence[str]) -> list[Part]:
    """What is known of these parameters: from the model, where the config names one of lamina's own; else shapes alone,
    as they are in the saved model. A user's own file is never run for a report."""
    model, sides = _model(run)
    fields = {} if model is None else _fields(model, sides)
    known = {} if model is None else {layer.name: layer for layer in layer_table(model)}
    shapes = {} if known else _shapes(run.path)
    parts = []
    for name in names:
        if name in known:
            layer = known[name]
            parts.append(Part(name, layer.kind, layer.shape, is_matrix(layer), fields.get(name)))
        else:
            shape = shapes.get(name)
            matrix = "bias" not in name.rpartition(".")[2] and (shape is None or len(shape) > 1)
            parts.append(Part(name, None, shape, matrix, None))
    return parts


def _model(run: Run) -> tuple[nn.Module | None, list[int]]:
    """The model, if it can be had, and the sides of its input that its settings speak of."""
    from lamina.config import load, model_of

    if run._fed is not None:
        return run._fed.model, []
    if not (run.path / "config.toml").is_file():
        return None, []
    with contextlib.suppress(LaminaError):
        config = load(run.path / "config.toml", env={})
        if config.model.entry is None:
            taken = config.model.arguments
            return model_of(config)(), [
                n for key, n in taken.items() if key in ("size", "length") and isinstance(n, int)
            ]
    return None, []


def _fields(model: nn.Module, sides: Sequence[int] = ()) -> dict[str, int]:
    from lamina.models.receptive_field import receptive_fields

    first = next((p for p in model.parameters() if p.ndim > 2), None)
    if first is None:
        return {}
    for side in (*sides, *_SIDES):
        with contextlib.suppress(LaminaError):
            found = receptive_fields(model, (first.shape[1], *[side] * (first.ndim - 2)))
            return {name: there.rf for name, there in found.items()}
    return {}


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    newest = [place / "model.safetensors" for place in reversed(checkpoint.committed(folder / "checkpoints"))]
    for file in (folder / "model.safetensors", *newest):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError), file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")  # a damaged file says anything
            head = json.loads(stream.read(min(length, file.stat().st_size)))
            return {name: tuple(said["shape"]) for name, said in head.items() if name != "__metadata__"}
    return {}


# ---- bytes


def _traffic(run: Run, parts: Sequence[Part]) -> tuple[dict[str, Counter[str]], Counter[str], Counter[str]]:
    """By direction and layer, of the probe by direction, and the sums to check."""
    names = {part.name for part in parts}
    sent: dict[str, Counter[str]] = {"up": Counter(), "down": Counter()}
    probe: Counter[str] = Counter()
    sums: Counter[str] = Counter()
    for row in _log(run.path, run.info["lengths"], "bytes.jsonl"):
        way, n = row["direction"], row["bytes"]
        sent[way][row["layer"]] += n
        sums[f"all {way}"] += n
        if row["phase"] != "round":
            probe[way] += n
            continue
        sums[f"round {way}"] += n
        if row["layer"] == "_unused":
            sums[f"unused {way}"] += n
        if row["layer"] in names:
            sums[f"layers {way}"] += n
    return sent, probe, sums


def _ledger(
    run: Run, sums: Mapping[str, int], columns: Mapping[str, Grid], by_client: Mapping[str, int] | None
) -> list[Ledger]:
    found = []
    for way in ("up", "down"):
        total = run.info[f"bytes_{way}"]
        rounds = sum(getattr(row, f"bytes_{way}") for row in run.records)
        found.append(Ledger(f"{way}: rows of bytes.jsonl, and the total in run.json", sums.get(f"all {way}", 0), total))
        found.append(Ledger(f"{way}: rounds of metrics.jsonl, and the total in run.json", rounds, total))
        if f"bytes_{way}" in columns:
            layers = int(np.nansum(columns[f"bytes_{way}"]))
            said = f"{way}: layers.jsonl, and the layers' rows of bytes.jsonl"
            found.append(Ledger(said, layers, sums.get(f"layers {way}", 0)))
        if by_client is not None:
            said = f"{way}: clients.jsonl, and the rounds' rows of bytes.jsonl"
            found.append(Ledger(said, by_client.get(way, 0), sums.get(f"round {way}", 0), sums.get(f"unused {way}", 0)))
    return found


# ---- clients


def _clients(folder: Path, lengths: Mapping[str, int]) -> tuple[list[Client], dict[str, int]]:
    clients: dict[int, Client] = {}
    sums: Counter[str] = Counter()
    for row in _log(folder, lengths, CLIENTS):
        client = clients.setdefault(row["client"], Client(str(row["name"]), row["examples"]))
        client.rounds.append(row["round"])
        client.bytes_up += row["bytes_up"]
        client.bytes_down += row["bytes_down"]
        sums["up"] += row["bytes_up"]
        sums["down"] += row["bytes_down"]
    return [clients[i] for i in sorted(clients)], dict(sums)


# ---- thinning


def bins(rounds: int, most: int) -> list[NDArray[np.int64]]:
    """Rounds in at most so many runs of neighbours, as equal as can be."""
    return np.array_split(np.arange(rounds), min(rounds, most)) if rounds else []


def means(grid: Grid, groups: Sequence[NDArray[np.int64]]) -> Grid:
    """The mean of every group of rounds; NaN where nothing in it was recorded."""
    out = np.full((len(grid), len(groups)), np.nan)
    for j, group in enumerate(groups):
        block = grid[:, group]
        there = ~np.isnan(block)
        counted = there.sum(1)
        some = counted > 0
        out[some, j] = np.where(there, block, 0).sum(1)[some] / counted[some]
    return out


def lasts(grid: Grid, groups: Sequence[NDArray[np.int64]]) -> Grid:
    """The last value recorded in every group of rounds."""
    out = np.full((len(grid), len(groups)), np.nan)
    for j, group in enumerate(groups):
        for t in group:  # later ones write over earlier ones
            there = ~np.isnan(grid[:, t])
            out[there, j] = grid[there, t]
    return out


def mean_of(grid: Grid, since: int = 0) -> Grid:
    """Per layer, over the rounds from `since` on; NaN where there is nothing."""
    part = grid[:, since:]
    return means(part, [np.arange(part.shape[1])])[:, 0] if part.shape[1] else np.full(len(grid), np.nan)


def last_of(grid: Grid) -> Grid:
    """Per layer, the last value recorded."""
    return lasts(grid, [np.arange(grid.shape[1])])[:, 0] if grid.shape[1] else np.full(len(grid), np.nan)
