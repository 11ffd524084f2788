"""A run's rounds once more, with every plan and every message through a TCP connection.

The bytes that came out of it, and the model, are compared with what is written. A TCP stream has no messages, so before
every frame goes its length, in 8 bytes that no ledger counts; they are stated apart.

It shows what every client was sent and sent, in bytes. In what order, it does not: a plan goes down when its client's
message has been made.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast

from lamina.errors import RunError
from lamina.federation import Federation
from lamina.folder import Row
from lamina.record import RoundRecord
from lamina.state import State
from lamina.terminal import Column, table
from lamina.verify.again import Model, expect_same_torch, opened, span
from lamina.verify.written import DIRECTIONS, Written

PREFIX = struct.Struct("<Q")  # length of the frame behind it
_PATIENCE = 60.0  # seconds for which one end waits for the other
_PIECE = 1 << 20


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
    run, fed, warning = opened(folder, fed)
    total = run.info["rounds"]
    state, end, written = span(folder, fed, run.info, afresh)
    if warning is not None:
        say(f"{warning}: the model is not compared")
        written = {}
    begin = state.round if state else 0
    expect_same_torch(run, say)
    why = "" if begin or afresh else ": there is no older checkpoint that is whole"
    say(f"rounds {begin} to {end - 1} of {total} once more, from {f'round-{begin:06d}' if begin else 'the start'}{why}")
    traffic = Written(folder, run.info).traffic
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
