"""Whether a run folder says what happened.

`files` compares what is written with itself: checksums, lengths, sums. `resend` makes rounds of the run once more, from
a checkpoint, with every plan and every message through a TCP connection, and compares the bytes that came out of it,
and the model, with what is written. A TCP stream has no messages, so before every frame goes its length, in 8 bytes
that no ledger counts; they are stated apart.

It shows what every client was sent and sent, in bytes. In what order, it does not: a plan goes down when its client's
message has been made.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

from safetensors import SafetensorError
from safetensors.torch import load_file

from lamina import checkpoint
from lamina.engine import mkl
from lamina.errors import LaminaError, RunError, StorageError
from lamina.federation import Federation, State
from lamina.folder import CLIENTS, Row, read_info, read_log, read_rows
from lamina.record import RoundRecord
from lamina.runs import Run, rebuilt
from lamina.store import ClientStore
from lamina.terminal import Column, table

PREFIX = struct.Struct("<Q")  # length of the frame behind it
AFRESH = 10  # rounds made once more from the start, where there is no checkpoint to begin at
DIRECTIONS = ("up", "down")
_PATIENCE = 60.0  # seconds for which one end waits for the other
_PIECE = 1 << 20

Accounts: TypeAlias = Counter[tuple[int, str]]  # (round, direction) -> bytes

# ---- what is written, compared with itself


class Check(NamedTuple):
    file: str
    said: str  # what was compared
    problem: str | None


def files(folder: Path) -> list[Check]:
    """One for every file of a run that is read again. Raises StorageError when run.json cannot be read."""
    here = _Written(folder, read_info(folder))
    done = here.info["rounds_done"]
    checks = [
        _checked("metrics.jsonl", f"{done} rounds; totals as in run.json", _metrics(here)),
        _checked("bytes.jsonl", "sums as in metrics.jsonl", _bytes(here)),
        _checked("layers.jsonl", "bytes as in bytes.jsonl", _layers(here)),
        _checked("events.jsonl", "whole lines", _whole(here, "events.jsonl")),
    ]
    if CLIENTS in here.info["lengths"]:
        checks.append(_checked(CLIENTS, "sums as in bytes.jsonl", _clients(here)))
    for place in checkpoint.committed(folder / "checkpoints"):
        checks.append(_checked(place.name, "checksums; bytes as in metrics.jsonl", _checkpoint(here, place)))
    if here.info["final_sha256"] is not None:
        checks.append(_checked("model.safetensors", "sha256 as in run.json", _model(here)))
    return checks


class _Written:
    """What is committed in a run folder."""

    def __init__(self, folder: Path, info: dict[str, Any]):
        self.folder = folder
        self.info = info

    @cached_property
    def rows(self) -> list[Row]:
        return read_rows(self.folder, self.info["lengths"]["metrics.jsonl"])

    @cached_property
    def traffic(self) -> Counter[tuple[int, str, str, str]]:
        """(round, phase, direction, layer) -> bytes."""
        traffic: Counter[tuple[int, str, str, str]] = Counter()
        try:
            for row in read_log(self.folder / "bytes.jsonl", self.info["lengths"]["bytes.jsonl"]):
                traffic[row["round"], row["phase"], row["direction"], row["layer"]] += row["bytes"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(f"bytes.jsonl is damaged: {error!r}", code="E404", where=str(self.folder)) from error
        return traffic

    def sums(self, *phases: str) -> Accounts:
        sums: Accounts = Counter()
        for (t, phase, direction, _), n in self.traffic.items():
            sums[t, direction] += n if phase in phases else 0
        return sums


def _checked(file: str, said: str, problems: Iterator[str]) -> Check:
    found: list[str] = []
    try:
        found.extend(problems)
    except LaminaError as error:
        found.append(error.message)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        found.append(f"cannot be read: {error!r}")
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return Check(file, said, found[0] + more if found else None)


def _whole(here: _Written, log: str) -> Iterator[str]:
    """Whether the file still has what was committed, in whole lines."""
    length = here.info["lengths"][log]
    with (here.folder / log).open("rb") as file:
        head = file.read(length)
    if len(head) < length:
        yield f"{len(head):,} bytes, run.json says {length:,}"
    elif head and not head.endswith(b"\n"):
        yield f"no line ends at byte {length:,}, where run.json says one does"


def _metrics(here: _Written) -> Iterator[str]:
    yield from _whole(here, "metrics.jsonl")
    done = here.info["rounds_done"]
    if [row.round for row in here.rows] != list(range(done)):
        yield f"{len(here.rows)} lines are not one for each of the {done} rounds"
    for direction in DIRECTIONS:
        total = 0
        for row in here.rows:
            total += getattr(row, f"bytes_{direction}")
            said = getattr(row, f"total_{direction}")
            if total != said:
                yield f"round {row.round}, {direction}: it adds up to {total:,} bytes so far, and says {said:,}"
                break
        if total != here.info[f"bytes_{direction}"]:
            yield f"{direction}: it adds up to {total:,} bytes, run.json says {here.info[f'bytes_{direction}']:,}"


def _bytes(here: _Written) -> Iterator[str]:
    yield from _whole(here, "bytes.jsonl")
    said = Counter({(row.round, way): getattr(row, f"bytes_{way}") for row in here.rows for way in DIRECTIONS})
    yield from _differ(here.sums("round", "probe"), said, "metrics.jsonl")


def _layers(here: _Written) -> Iterator[str]:
    yield from _whole(here, "layers.jsonl")
    for row in read_log(here.folder / "layers.jsonl", here.info["lengths"]["layers.jsonl"]):
        for direction in DIRECTIONS:
            n, said = row[f"bytes_{direction}"], here.traffic[row["round"], "round", direction, row["layer"]]
            if n != said:
                yield f"round {row['round']}, {direction}, {row['layer']}: {n:,} bytes, bytes.jsonl says {said:,}"


def _clients(here: _Written) -> Iterator[str]:
    yield from _whole(here, CLIENTS)
    sums: Accounts = Counter()
    for row in read_log(here.folder / CLIENTS, here.info["lengths"][CLIENTS]):
        for direction in DIRECTIONS:
            sums[row["round"], direction] += row[f"bytes_{direction}"]
    yield from _differ(sums, here.sums("round"), "bytes.jsonl")


def _differ(sums: Accounts, said: Accounts, where: str) -> Iterator[str]:
    for t, direction in sorted({*sums, *said}):
        n, other = sums[t, direction], said[t, direction]
        if n != other:
            yield f"round {t}, {direction}: its rows add up to {n:,} bytes, {where} says {other:,}"


def _checkpoint(here: _Written, place: Path) -> Iterator[str]:
    if not checkpoint.intact(place):
        if place.is_dir():  # else the run goes on, and has made two newer ones
            yield "its files do not match their checksums"
        return
    state = json.loads((place / "state.json").read_bytes())
    if state["round"] > len(here.rows):  # the run was stopped before run.json knew of it: `resume` begins here
        return
    for direction in DIRECTIONS:
        n = state[f"bytes_{direction}"]
        total = sum(getattr(row, f"bytes_{direction}") for row in here.rows[: state["round"]])
        if n != total:
            yield f"{direction}: {n:,} bytes, metrics.jsonl adds up to {total:,} in these {state['round']} rounds"


def _model(here: _Written) -> Iterator[str]:
    """The file has the whole state_dict; which of it counts as the model, a checkpoint knows."""
    newest = checkpoint.latest(here.folder / "checkpoints")
    if newest is None:
        return
    tensors = load_file(here.folder / "model.safetensors")
    names = [name.partition("/") for name in load_file(newest / "model.safetensors")]
    params, buffers = ({n: tensors[n] for kind, _, n in names if kind == part} for part in ("params", "buffers"))
    sha256, said = State(params, buffers, (), ClientStore()).sha256(), here.info["final_sha256"]
    if sha256 != said:
        yield f"sha256 {sha256[:12]}, run.json says {said[:12]}"


# ---- what is written, compared with what a socket carries


class Trip(NamedTuple):
    """All frames of one round in one direction."""

    round: int
    direction: str
    frames: int
    socket: int  # bytes that came out of it
    prefixes: int  # of them, before the frames
    metrics: int  # bytes by metrics.jsonl
    rows: int  # by the rows of bytes.jsonl

    @property
    def difference(self) -> int:
        """What the socket carried and the ledger does not have, by whichever of its files is further off."""
        own = self.socket - self.prefixes
        return max(own - self.metrics, own - self.rows, key=abs)


class Share(NamedTuple):
    """Bytes of one layer, in one phase and direction of one round: as measured in the frames, and in bytes.jsonl."""

    round: int
    phase: str
    direction: str
    layer: str
    frames: int
    rows: int


class Model(NamedTuple):
    """The model after a round that was made once more, and that of a checkpoint or of run.json."""

    round: int
    sha256: str
    where: str
    written: str


class Resent(NamedTuple):
    """Rounds that were made once more."""

    trips: tuple[Trip, ...]
    shares: tuple[Share, ...]
    models: tuple[Model, ...]

    @property
    def problems(self) -> list[str]:
        return [
            *(
                f"round {t.round}, {t.direction}: {t.socket - t.prefixes:,} bytes came through the socket, "
                f"metrics.jsonl says {t.metrics:,} and bytes.jsonl {t.rows:,}"
                for t in self.trips
                if t.difference
            ),
            *(
                f"round {s.round}, {s.direction}, {s.layer}: {s.frames:,} bytes in the frames, bytes.jsonl says "
                f"{s.rows:,}"
                for s in self.shares
                if s.frames != s.rows
            ),
            *(
                f"after round {m.round} the model is {m.sha256[:12]}, {m.where} has {m.written[:12]}"
                for m in self.models
                if m.sha256 != m.written
            ),
        ]

    def events(self, layers: bool) -> Iterator[dict[str, Any]]:
        """The same as plain values."""
        for trip in self.trips:
            yield {"event": "wire", **trip._asdict(), "difference": trip.difference}
        for share in self.shares if layers else ():
            yield {"event": "layer", **share._asdict()}
        for model in self.models:
            yield {"event": "model", **model._asdict()}


def resend(
    folder: str | Path, *, fed: Federation | None = None, afresh: bool = False, say: Callable[[str], None] = print
) -> Resent:
    """Makes the rounds between the two newest checkpoints once more, with every frame through a socket.

    Args:
        fed: for a run that was not made from a config.
        afresh: begin at round 0, with the probe if there is one. Where there is no older checkpoint that is whole, it
            begins there anyway, with at most `AFRESH` rounds.
        say: is told which rounds are made, and what cannot be compared.

    Raises:
        StorageError: E403 no run, or no round in it; E404 it is damaged; E405 config, data or engine are not what it
            was made with.
    """
    folder = Path(folder)
    run = Run.open(folder, fed=fed)
    fed, warning = rebuilt(run)
    total = run.info["rounds"]
    if not run.info["rounds_done"]:
        raise StorageError("no round of this run is committed yet", code="E403", where=str(folder))
    if [row.round for row in run.records] != list(range(run.info["rounds_done"])):
        raise StorageError("metrics.jsonl has not one line for each round", code="E404", where=str(folder))
    state, end, written = _span(folder, fed, run.info, afresh)
    if warning is not None:
        say(f"{warning}: the model is not compared")
        written = {}
    begin = state.round if state else 0
    if mkl.label() != run.info["torch"]:
        say(f"this run was made with torch {run.info['torch']}: with {mkl.label()} the last bits may be others")
    why = "" if begin or afresh else ": there is no older checkpoint that is whole"
    say(f"rounds {begin} to {end - 1} of {total} once more, from {f'round-{begin:06d}' if begin else 'the start'}{why}")
    traffic = _Written(folder, run.info).traffic
    trips: list[Trip] = []
    shares: list[Share] = []
    models: list[Model] = []
    with Line() as line:
        going = fed.over(line).run(total - begin, state, evaluate_every=total)
        del state  # so that its rows can go
        with contextlib.closing(cast("Generator[tuple[State, RoundRecord]]", going)):
            for state, record in going:
                t = record.round
                rows = {key[1:]: n for key, n in traffic.items() if key[0] == t}
                trips += [_trip(line, run.records[t], direction, rows) for direction in DIRECTIONS]
                line.begin()
                shares += _shares(record, rows)
                if state.round in written:
                    models.append(Model(t, state.sha256(), *written[state.round]))
                if state.round == end:
                    break
    return Resent(tuple(trips), tuple(shares), tuple(models))


def _span(
    folder: Path, fed: Federation, info: Mapping[str, Any], afresh: bool
) -> tuple[State | None, int, dict[int, tuple[str, str]]]:
    """Where to begin, how many rounds are done at the end, and what model is written where after how many rounds."""
    done = info["rounds_done"]
    written: dict[int, tuple[str, str]] = {}
    if info["final_sha256"] is not None:
        written[done] = ("run.json", info["final_sha256"])
    start: State | None = None
    for place in filter(checkpoint.intact, checkpoint.committed(folder / "checkpoints")):  # oldest first
        state, _ = checkpoint.read(place, fed)
        written[state.round] = (place.name, state.sha256())
        if start is None and state.round < done:
            start = state
    if afresh:
        return None, done, written
    return (None, min(done, AFRESH), written) if start is None else (start, done, written)


def _trip(line: Line, row: Row, direction: str, rows: Mapping[tuple[str, str, str], int]) -> Trip:
    frames = line.frames[direction]
    counted = sum(n for (_, way, _), n in rows.items() if way == direction)
    prefixes = frames * PREFIX.size
    said = getattr(row, f"bytes_{direction}")
    return Trip(row.round, direction, frames, line.bytes[direction], prefixes, said, counted)


def _shares(record: RoundRecord, rows: Mapping[tuple[str, str, str], int]) -> list[Share]:
    measured = {traffic[:3]: traffic.bytes for traffic in record.traffic}
    keys = [*measured, *(key for key in rows if key not in measured)]
    return [Share(record.round, *key, measured.get(key, 0), rows.get(key, 0)) for key in keys]


class Line:
    """A TCP connection on this machine: plans go from its server's end to its clients', messages the other way. Each
    end is used by a thread of its own.

    Attributes:
        frames, bytes: "up" or "down" -> how many came out of the socket, since `begin`.
    """

    def __init__(self) -> None:
        with _connecting(), socket.create_server(("127.0.0.1", 0)) as door:
            self._clients = socket.create_connection(door.getsockname(), _PATIENCE)
            self._server, _ = door.accept()
            self._server.settimeout(_PATIENCE)
        self._elsewhere = ThreadPoolExecutor(1, "clients")
        self.begin()

    def begin(self) -> None:
        self.frames: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *exception: object) -> None:
        for end in (self._server, self._clients):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # wakes who waits for it
            end.close()
        self._elsewhere.shutdown()

    def __call__(self, kind: str, blob: bytes) -> bytes:
        """A `lamina.wire.frame.Carry`."""
        with _connecting():
            if kind == "plan":
                arriving = self._elsewhere.submit(_receive, self._clients)
                _send(self._server, blob)
                arrived, size = arriving.result()
            else:
                sending = self._elsewhere.submit(_send, self._clients, blob)
                arrived, size = _receive(self._server)
                sending.result()
        direction = "down" if kind == "plan" else "up"
        self.frames[direction] += 1
        self.bytes[direction] += size
        return arrived


def _send(end: socket.socket, blob: bytes) -> None:
    end.sendall(PREFIX.pack(len(blob)))
    end.sendall(blob)


def _receive(end: socket.socket) -> tuple[bytes, int]:
    """The next frame, and how many bytes came out of the socket for it."""
    head = _exactly(end, PREFIX.size)
    (length,) = PREFIX.unpack(head)
    blob = _exactly(end, length)
    return blob, len(head) + len(blob)


def _exactly(end: socket.socket, length: int) -> bytes:
    pieces: list[bytes] = []
    while length:
        piece = end.recv(min(length, _PIECE))
        if not piece:
            raise ConnectionError("it was closed in the middle of a frame")
        pieces.append(piece)
        length -= len(piece)
    return b"".join(pieces)


@contextlib.contextmanager
def _connecting() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"the TCP connection on 127.0.0.1 failed: {error}",
            code="E305",
            remedy="verify without --wire needs none",
        ) from error


# ---- as tables


def files_table(checks: Sequence[Check], width: int | None) -> list[str]:
    return table(
        [
            Column("file", [check.file for check in checks], left=True),
            Column("", ["fails" if check.problem else "holds" for check in checks], left=True),
            Column("", [check.problem or check.said for check in checks], left=True),
        ],
        width,
    )


def wire_table(resent: Resent, width: int | None) -> list[str]:
    ways = [[trip for trip in resent.trips if trip.direction == direction] for direction in DIRECTIONS]

    def numbers(of: Callable[[Trip], int]) -> list[str]:
        return [f"{sum(map(of, way)):,}" for way in ways]

    lines = table(
        [
            Column("", DIRECTIONS, left=True),
            Column("frames", numbers(lambda trip: trip.frames), 1),
            Column("on the socket", numbers(lambda trip: trip.socket)),
            Column("prefixes", numbers(lambda trip: trip.prefixes)),
            Column("metrics.jsonl", numbers(lambda trip: trip.metrics)),
            Column("bytes.jsonl", numbers(lambda trip: trip.rows)),
            Column("difference", numbers(lambda trip: abs(trip.difference))),
        ],
        width,
    )
    if not resent.models:
        lines.append("  model: compared with none")
    for model in resent.models:
        same = "that of" if model.sha256 == model.written else f"not {model.written[:12]} as in"
        lines.append(f"  model after round {model.round}: {model.sha256[:12]}, {same} {model.where}")
    return lines


def layers_table(resent: Resent, width: int | None) -> list[str]:
    frames: Counter[tuple[str, str, str]] = Counter()
    rows: Counter[tuple[str, str, str]] = Counter()
    off: Counter[tuple[str, str, str]] = Counter()
    for share in resent.shares:
        key = share.direction, share.phase, share.layer
        frames[key] += share.frames
        rows[key] += share.rows
        off[key] += abs(share.frames - share.rows)
    return table(
        [
            Column("", [direction for direction, _, _ in frames], left=True),
            Column("", [phase for _, phase, _ in frames], left=True),
            Column("layer", [layer for _, _, layer in frames], left=True),
            Column("in the frames", [f"{n:,}" for n in frames.values()]),
            Column("bytes.jsonl", [f"{rows[key]:,}" for key in frames]),
            Column("difference", [f"{off[key]:,}" for key in frames]),
        ],
        width,
    )
