"""A run folder: what is written into it, and how it is read back.

A commit appends to the jsonl files first and then makes a checkpoint that knows their lengths. Whoever goes on from
that checkpoint cuts them to these lengths, so a row that was written by half is never read as a whole one.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from safetensors.torch import save

from lamina import checkpoint, lock
from lamina.data import ClientData
from lamina.errors import StorageError
from lamina.federation import Federation
from lamina.record import RoundRecord
from lamina.redaction import hidden, hidden_in
from lamina.settings import CHANGEABLE, is_among
from lamina.state import State
from lamina.store.files import replace

if TYPE_CHECKING:
    from lamina.config import Config

VERSION = 1
LOGS = ("metrics.jsonl", "layers.jsonl", "bytes.jsonl", "events.jsonl")
CLIENTS = "clients.jsonl"  # by choice
_NEEDED = (  # what everybody reads of run.json
    "status", "method", "method_repr", "uplink", "downlink", "personal", "data", "partition", "clients", "cohort",
    "seed", "split_sha256", "pool_sha256", "initial_sha256", "final_sha256", "config_sha256", "torch", "engine",
    "options", "rounds", "rounds_done", "bytes_up", "bytes_down", "lengths", "seconds",
)  # fmt: skip
_BYTES = ("bytes_up", "bytes_down", "total_up", "total_down", "fedavg_up", "fedavg_down")
_DAMAGED = "`lamina resume` goes on from an older checkpoint, if one is whole"
_HOLDERS = 4096  # rows of split.json that are in memory at a time


class Row(NamedTuple):
    """One round as in metrics.jsonl; totals are since the start of the run."""

    round: int
    in_sync: bool
    accuracy: float | None
    loss: float | None
    personal_accuracy: float | None
    accuracy_before: float | None
    metrics: dict[str, float | None]  # None where one is undefined
    train_loss: float
    lr: float
    clients: int
    refused: int
    uploaded: int  # parameters of which updates were sent
    parameters: int
    bytes_up: int
    bytes_down: int
    total_up: int
    total_down: int
    fedavg_up: int  # in total, what FedAvg with fp32 would have sent until here
    fedavg_down: int
    seconds: float
    network_seconds: float | None = None  # in total, on the virtual network's clock
    epsilon: float | None = None  # of all rounds until here

    @property
    def saving(self) -> float:
        """Share of FedAvg's bytes, both ways, that did not travel."""
        return 1 - (self.total_up + self.total_down) / max(1, self.fedavg_up + self.fedavg_down)


# ---- writing


class Book:
    """Writes a run folder."""

    def __init__(self, folder: Path, info: dict[str, Any], best: Row | None = None, kept: Row | None = None):
        self.folder = folder
        self.info = info
        self._best = best  # until now; what is not committed yet stands in no run.json
        self._kept = kept  # the best of those rounds after which there is a checkpoint
        self._final: Row | None = None  # since the start of this process
        self.logs = (*LOGS, CLIENTS) if info["options"]["keep_clients_log"] else LOGS
        self._lines: dict[str, list[str]] = {log: [] for log in self.logs}
        self._began = time.monotonic() - info["seconds"]
        self._pace = checkpoint.Pace()
        self._last: Row | None = None

    def round(self, state: State, record: RoundRecord, before: Row | None) -> Row:
        row = row_after(state, record, before)
        for log, line in logged(row, record):
            if log in self._lines:
                self._lines[log].append(_line(hidden_in(line) if log == "events.jsonl" else line))
        if counts(row):
            self._best = best_of([row] if self._best is None else [self._best, row], self.info["personal"])
            self._final = row
        self._last = row
        return row

    def event(self, event: Mapping[str, Any]) -> None:
        self._lines["events.jsonl"].append(_line(hidden_in(finite(event))))

    def due(self, every: int | Literal["auto"], done: int) -> bool:
        return self._pace.due() if every == "auto" else done % every == 0

    def commit(self, state: State) -> None:
        """Raises StorageError E401; what was committed before is intact."""
        began = time.monotonic()
        with storing(self.folder):
            lengths = self._written()
        kept = self._kept
        if self._last is not None and counts(self._last) and self._last.round + 1 == state.round:
            kept = best_of([self._last] if kept is None else [kept, self._last], self.info["personal"])
        checkpoint.commit(
            state,
            self.folder / "checkpoints",
            {"lengths": lengths},
            after=self.info["rounds_done"],
            best=None if kept is None else kept.round + 1,
        )
        self._kept = kept
        for lines in self._lines.values():
            lines.clear()
        self.info |= {
            "lengths": lengths,
            "rounds_done": state.round,
            "bytes_up": state.bytes_up,
            "bytes_down": state.bytes_down,
        }
        if self._final is not None:
            self.info |= {"final": result(self._final), "best": result(self._best)}
        with storing(self.folder):
            self.save()
        self._pace.took(time.monotonic() - began)

    def _written(self) -> dict[str, int]:
        """The logs with what is new, and how long they are then."""
        for log, lines in self._lines.items():
            if lines:
                _append(self.folder / log, self.info["lengths"][log], "".join(lines).encode())
        return {log: os.path.getsize(self.folder / log) for log in self.logs}

    def finish(self, fed: Federation, state: State | None, status: str, code: int) -> None:
        if state is not None:
            tensors = {n: x.detach().clone().contiguous() for n, x in fed.module(state).state_dict().items()}
            sha256 = state.sha256()
            with storing(self.folder):
                replace(self.folder / "model.safetensors", save(tensors))
            self.info["final_sha256"] = sha256  # only now: Ctrl-C may come at any point, and run.json is written then
        self.info |= {"status": status, "exit_code": code, "error": None}
        with storing(self.folder):
            self.info["lengths"] = self._written()  # events since the last commit
            self.save()

    def last_words(self, state: State | None) -> None:
        """Commits the rounds that were done when something else failed."""
        if state is not None and self.info["rounds_done"] < state.round:
            with contextlib.suppress(Exception):  # what failed first is what must be said
                self.commit(state)

    def fail(self, status: str, code: int, error: str) -> None:
        self.info |= {"status": status, "exit_code": code, "error": hidden(error)}
        with contextlib.suppress(
            OSError
        ):  # a full disk: then the status stays "running", and `resume` works all the same
            self.save()

    @property
    def seconds(self) -> float:
        """Since the start of the run, pauses left out."""
        return float(time.monotonic() - self._began)

    def save(self) -> None:
        self.info["seconds"] = round(self.seconds, 3)
        self.info["updated"] = now()
        replace(self.folder / "run.json", document(self.info))


def row_after(state: State, record: RoundRecord, before: Row | None) -> Row:
    """What metrics.jsonl says of a round.

    Args:
        state: after it.
        before: the row of the round before.
    """
    return Row(
        round=record.round,
        in_sync=record.in_sync,
        accuracy=record.accuracy,
        loss=record.loss,
        personal_accuracy=record.personal_accuracy,
        accuracy_before=record.accuracy_before,
        metrics=record.metrics,
        train_loss=record.train_loss,
        lr=record.lr,
        clients=len(record.cohort),
        refused=sum(c.refused is not None for c in record.clients),
        uploaded=sum(layer.uploaded for layer in record.layers.values()),
        parameters=len(record.layers),
        bytes_up=record.bytes_up,
        bytes_down=record.bytes_down,
        total_up=state.bytes_up,
        total_down=state.bytes_down,
        fedavg_up=record.fedavg_up + (before.fedavg_up if before else 0),
        fedavg_down=record.fedavg_down + (before.fedavg_down if before else 0),
        seconds=round(record.seconds, 4),
        network_seconds=None if record.network_seconds is None else record.network_seconds + _clock(before),
        epsilon=record.epsilon,
    )


OF_ROUNDS = ("refused", "skipped")  # events that a round leaves; others are of processes


def logged(row: Row, record: RoundRecord) -> Iterator[tuple[str, dict[str, Any]]]:
    """The log and the line, for every line that a round leaves."""
    t = record.round
    yield "metrics.jsonl", finite(row._asdict())
    for name, layer in record.layers.items():
        said = {key: value for key, value in layer._asdict().items() if value is not None}
        yield "layers.jsonl", finite({"round": t, "layer": name, **said})
    for traffic in record.traffic:
        yield "bytes.jsonl", {"round": t, **traffic._asdict()}
    for event in record.events:
        yield "events.jsonl", finite({"event": "refused", "round": t, **event})
    for client in record.clients:
        yield CLIENTS, finite({"round": t, **client._asdict()})


def _clock(before: Row | None) -> float:
    return 0.0 if before is None or before.network_seconds is None else before.network_seconds


def counts(row: Row) -> bool:
    return row.in_sync and (row.accuracy is not None or row.loss is not None)


def standing(row: Row, personal: bool) -> float | None:
    """The accuracy that a round stands for: where clients keep models of their own and the global one is not trained,
    the personal one."""
    return row.personal_accuracy if personal else row.accuracy


def best_of(rows: Sequence[Row], personal: bool) -> Row | None:
    """The round in sync with the highest accuracy (the lowest loss, where there is none); the first of equals."""
    tested = [row for row in rows if counts(row)]
    return max(tested, key=lambda row: (standing(row, personal) or 0.0, -(row.loss or 0.0))) if tested else None


def split_table(data: ClientData) -> dict[str, Any]:
    """split.json: who holds how much, and of which labels (`labels` is None where there are none)."""
    clients = [{"client": name, "examples": n, "labels": labels} for name, n, labels in _holders(data)]
    return {**_split(data), "clients": clients}


def _split(data: ClientData) -> dict[str, Any]:
    return {
        "data": data.name,
        "partition": data.partition,
        "split_sha256": data.split_sha256,
        "pool_sha256": data.pool_sha256,
        "classes": data.classes,
        "label_names": None if data.label_names is None else [*data.label_names[: data.classes or 0]],
    }


def _holders(data: ClientData) -> Iterator[tuple[str, int, list[int] | None]]:
    """Name, examples and labels of every client. A million tables in Python at once would take more than the data."""
    sizes = data.sizes
    for first in range(0, len(data), _HOLDERS):
        end = min(first + _HOLDERS, len(data))
        table = data.label_table(first, end)
        labels = [None] * (end - first) if table is None else table.tolist()
        yield from zip(data.names[first:end], sizes[first:end].tolist(), labels, strict=True)


def result(row: Row | None) -> dict[str, Any] | None:
    """What run.json says of the best round and of the final one."""
    return row and {
        "round": row.round,
        "accuracy": row.accuracy,
        "loss": row.loss,
        "personal_accuracy": row.personal_accuracy,
        "total_up": row.total_up,
        "total_down": row.total_down,
    }


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


# ---- going on


def restore(folder: Path, fed: Federation, known: Mapping[str, int]) -> tuple[State | None, dict[str, int], list[str]]:
    """The newest checkpoint that is whole and whose logs are, the logs' lengths, and the damaged ones passed over."""
    places = checkpoint.committed(folder / "checkpoints")
    passed: list[str] = []
    for place in reversed(places):
        if checkpoint.intact(place):
            state, extra = checkpoint.read(place, fed)
            lengths: dict[str, int] = extra["lengths"]
            if _logs_agree(folder, lengths, state):
                return state, lengths, passed
        passed.append(place.name)
    if places:
        raise StorageError(
            f"none of {', '.join(p.name for p in places)} is whole, with the logs that belong to it",
            code="E404",
            where=str(folder),
            remedy="start again: lamina run config.toml",
        )
    return None, dict.fromkeys(known, 0), passed  # stopped before its first commit


def _logs_agree(folder: Path, lengths: Mapping[str, int], state: State) -> bool:
    """Whether the logs are as long as they were, end with whole lines, and add up to the state's bytes."""
    sums = {"up": 0, "down": 0}
    try:
        for log, length in lengths.items():
            with (folder / log).open("rb") as file:
                head = file.read(length)
            if len(head) != length or (head and not head.endswith(b"\n")):
                return False
        for row in read_log(folder / "bytes.jsonl", lengths["bytes.jsonl"]):
            sums[row["direction"]] += row["bytes"]
    except (OSError, ValueError, KeyError):
        return False
    return sums == {"up": state.bytes_up, "down": state.bytes_down}


# ---- files


def read_info(folder: Path) -> dict[str, Any]:
    """run.json. Raises StorageError: E403 there is none, E404 it is damaged, E405 it is of another version."""
    try:
        info: dict[str, Any] = json.loads((folder / "run.json").read_bytes())
        version = info.get("version")
        missing = [key for key in _NEEDED if key not in info]
    except (FileNotFoundError, NotADirectoryError):
        raise StorageError(
            f"there is no run at {folder}", code="E403", remedy="`lamina list runs` names them"
        ) from None
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise StorageError(f"{folder / 'run.json'} is damaged: {error}", code="E404") from error
    if version != VERSION:
        raise StorageError(f"{folder} has version {version}, this lamina reads {VERSION}", code="E405")
    if missing or not isinstance(info["lengths"], dict):
        said = f"it has no {', '.join(missing)}" if missing else "its lengths are no table"
        raise StorageError(f"{folder / 'run.json'} is damaged: {said}", code="E404")
    return info


def read_rows(folder: Path, length: int) -> list[Row]:
    """The first `length` bytes of metrics.jsonl. Raises StorageError E404."""
    path = folder / "metrics.jsonl"
    try:
        if path.stat().st_size < length:
            raise ValueError(f"{path.stat().st_size} bytes, expected {length}")
        rows = [row_of(line) for line in read_log(path, length)]
        whole = ("round", "clients", "refused", "uploaded", "parameters", *_BYTES)
        if any(not isinstance(getattr(row, name), int) for row in rows for name in whole):
            raise ValueError("a row lacks what every row has")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise StorageError(f"{path} is damaged: {error}", code="E404", remedy=_DAMAGED) from error
    return rows


def read_environment(folder: Path) -> dict[str, Any]:
    """env.json. Raises StorageError E404."""
    try:
        found: dict[str, Any] = json.loads((folder / "env.json").read_bytes())
        found["data"]["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{folder / 'env.json'} is missing or damaged: {error!r}", code="E404", where=str(folder)
        ) from error
    return found


def other_settings(folder: Path, config: Config, *, resuming: bool = False) -> list[str]:
    """What this config says otherwise than the run in this folder was begun with: keys, and files behind an entry.
    Where that lamina had no such key, what this one does unless it is told is what that one did.

    Args:
        resuming: leave out what may change in a run that has begun.
    """
    recorded = read_environment(folder)
    before, after = recorded.get("config", {}), json.loads(json.dumps(config.settings))
    after = {key: x for key, x in after.items() if key in before or config.origin(key) != "default"}
    keys = [key for key in {**before, **after} if before.get(key, ...) != after.get(key, ...)]
    other = [key for key in keys if not (resuming and is_among(key, CHANGEABLE))]
    files = recorded.get("entries", {})
    changed = [key for key, sha256 in config.entry_sha256.items() if key not in keys and files.get(key) != sha256]
    return other + [f"{config.settings[key].rpartition(':')[0]} ({key}) has changed" for key in changed]


def row_of(values: Mapping[str, Any]) -> Row:
    return Row._make(values.get(name) for name in Row._fields)


def read_log(path: Path, length: int) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for line in file.read(length).splitlines():
            yield json.loads(line)


def _append(path: Path, at: int, blob: bytes) -> None:
    """Writes behind the first `at` bytes; what a failed commit left there goes."""
    with path.open("r+b") as file:
        file.truncate(at)
        file.seek(at)
        file.write(blob)
        file.flush()
        os.fsync(file.fileno())


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    return value


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def document(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def split_document(data: ClientData) -> Iterator[bytes]:
    """split.json with one line per client, piece by piece."""
    head = json.dumps(_split(data), indent=1, ensure_ascii=False).removesuffix("\n}")
    start = f'{head},\n "clients": [\n  '
    text = json.JSONEncoder(ensure_ascii=False).encode
    lines = (  # a list of whole numbers is written by Python as it is in JSON
        f'{{"client": {text(name)}, "examples": {n}, "labels": {"null" if labels is None else labels}}}'
        for name, n, labels in _holders(data)
    )
    while some := list(itertools.islice(lines, _HOLDERS)):
        yield (start + ",\n  ".join(some)).encode()
        start = ",\n  "
    yield b"\n ]\n}\n"


@contextlib.contextmanager
def storing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason, remedy = (
            error.strerror or str(error),
            "what was committed is intact, and `lamina resume` goes on from it",
        )
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            there = next((p for p in (folder, *folder.absolute().parents) if p.exists()), None)
            reason += f" ({shutil.disk_usage(there).free} bytes are free)" if there else ""
            remedy = f"make room; {remedy}"
        elif error.errno in (errno.ENOTDIR, errno.EEXIST):
            reason, remedy = "a file is where a folder should be", "another folder: --run-dir, LAMINA_RUNS or out="
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            remedy = "make it writable, or another folder: --run-dir, LAMINA_RUNS or out="
        raise StorageError(
            f"cannot write: {reason}", code="E401", where=str(error.filename or folder), remedy=remedy
        ) from error


def expect_within(folder: Path) -> None:
    """Nothing that is written to may be a link: a folder that somebody else has made could lead to any file.

    Raises:
        StorageError: E405.
    """
    inner = (folder, folder / "checkpoints", folder / "export")
    links = [path for place in inner if place.is_dir() for path in place.iterdir() if path.is_symlink()]
    if links:
        raise StorageError(
            f"{links[0].relative_to(folder)} is a link: a run is written into its own folder alone",
            code="E405",
            where=str(folder),
            remedy="put what it leads to in its place; to have runs elsewhere: --run-dir, LAMINA_RUNS or out=",
        )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time, see `lamina.lock`. Raises StorageError E405, too, for a folder that leads elsewhere."""
    expect_within(folder)
    with contextlib.ExitStack() as held:
        with storing(folder):
            held.enter_context(lock.locked(folder / ".lock", str(folder)))
        yield
