"""Rounds of a run once more, as they were made, and every bit of what they leave compared with what is written."""

from __future__ import annotations

import contextlib
import copy
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from lamina import checkpoint
from lamina.errors import StorageError, expect, is_whole
from lamina.federation import Federation
from lamina.folder import OF_ROUNDS, logged, read_log, row_after
from lamina.random import generator
from lamina.record import RoundRecord
from lamina.redaction import hidden_in
from lamina.runs import Run
from lamina.state import State
from lamina.store import ClientStore
from lamina.terminal import Column, table
from lamina.verify.again import expect_same_torch, opened

_TESTED = ("accuracy", "loss", "personal_accuracy", "accuracy_before", "metrics")


class Stretch(NamedTuple):
    """Rounds that follow each other, made once more from what was kept before the first of them."""

    begin: int
    end: int
    start: str  # "round-000012", or "the start"
    kept: str  # the checkpoint, or run.json, that the state at its end was compared with; "" for none


class Replayed(NamedTuple):
    """Rounds that were made once more."""

    stretches: tuple[Stretch, ...]
    problems: tuple[str, ...]

    @property
    def rounds(self) -> int:
        return sum(stretch.end - stretch.begin for stretch in self.stretches)

    def events(self) -> Iterator[dict[str, Any]]:
        """The same as plain values."""
        for stretch in self.stretches:
            yield {"event": "replayed", **stretch._asdict()}


def replay(
    folder: str | Path,
    rounds: int,
    *,
    seed: int = 0,
    fed: Federation | None = None,
    afresh: bool = False,
    say: Callable[[str], None] = print,
) -> Replayed:
    """Makes rounds of a run once more: as many as asked for, behind its checkpoints and from the start on.

    Args:
        rounds: how many, shared among these places by chance.
        seed: of that chance.
        fed: for a run that was not made from a config.
        afresh: all rounds, from the start.
        say: is told which rounds are made.

    Raises:
        StorageError: E403 no run, or no round in it; E404 it is damaged; E405 config, data or engine are not what it
            was made with.
    """
    expect(is_whole(rounds, 1), f"rounds={rounds!r}: expected a whole number >= 1", where="rounds")
    folder = Path(folder)
    run, fed, warning = opened(folder, fed)
    if warning is not None:
        raise StorageError(warning, code="E405", where=str(folder), remedy="replay it on as many cores")
    expect_same_torch(run, say)
    aside = copy.copy(fed)
    aside.store = ClientStore()  # what its clients remember stays in memory: the run is not written to
    places = checkpoint.committed(folder / "checkpoints")
    kept = {_done(place): place for place in places if checkpoint.intact(place)}
    done = run.info["rounds_done"]
    lines = _lines(run)
    stretches: list[Stretch] = []
    problems: list[str] = []
    starts = [0] if afresh else sorted({0, *(n for n in kept if n < done)})
    for begin, end in _drawn(starts, done, done if afresh else rounds, seed):
        start = kept[begin].name if begin else "the start"
        say(f"rounds {begin} to {end - 1} of {run.info['rounds']} once more, from {start}")
        compared = ""
        state = checkpoint.read(kept[begin], fed)[0] if begin else None
        every = run.info["options"]["evaluate_every"]
        going = aside.run(run.info["rounds"] - begin, state, evaluate_every=every)
        del state  # so that its rows can go
        with contextlib.closing(cast("Generator[tuple[State, RoundRecord]]", going)):
            for after, record in going:
                problems += _records(run, after, record, lines)
                if after.round in kept:
                    compared = kept[after.round].name
                    for file in checkpoint.differences(after, kept[after.round]):
                        problems.append(f"after round {record.round} the state is not that in {compared}/{file}")
                elif after.round == done and run.info["final_sha256"] is not None:
                    compared = "run.json"
                    if after.sha256() != run.info["final_sha256"]:
                        problems.append(f"after round {record.round} the model is not that of run.json")
                if after.round == end:
                    break
        stretches.append(Stretch(begin, end, start, compared))
    return Replayed(tuple(stretches), tuple(problems))


def _done(place: Path) -> int:
    return int(place.name.rpartition("-")[2])


def _drawn(starts: Sequence[int], done: int, rounds: int, seed: int) -> Iterator[tuple[int, int]]:
    """So many rounds, each behind one of these or behind one that was drawn before it."""
    ends = [*starts[1:], done]
    source = generator(seed, "replay")
    many: Counter[int] = Counter()
    for _ in range(min(rounds, done - starts[0])):
        free = [i for i, start in enumerate(starts) if start + many[i] < ends[i]]
        many[free[int(torch.randint(len(free), (), generator=source))]] += 1
    for i, start in enumerate(starts):
        if many[i]:
            yield start, start + many[i]


def _lines(run: Run) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Log, round -> what is written there, in any order."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    try:
        for log, length in run.info["lengths"].items():
            for row in read_log(run.path / log, length):
                if log != "events.jsonl" or row["event"] in OF_ROUNDS:
                    found[log, row["round"]].append(row)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{log} is damaged: {error!r}", code="E404", where=str(run.path)) from error
    return found


def _records(
    run: Run, state: State, record: RoundRecord, lines: dict[tuple[str, int], list[dict[str, Any]]]
) -> Iterator[str]:
    """What this round says otherwise than the logs."""
    t = record.round
    made: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for log, row in logged(row_after(state, record, run.records[t - 1] if t else None), record):
        if log in run.info["lengths"]:
            made[log].append(row)
    for log in run.info["lengths"]:
        mine, theirs = made[log], lines[log, t]
        if log == "metrics.jsonl":
            mine, theirs = [_timeless(row, *theirs) for row in mine], [_timeless(row, *mine) for row in theirs]
        if log == "events.jsonl":  # which are written without secrets
            mine, theirs = hidden_in(mine), hidden_in(theirs)
        if sorted(map(_text, mine)) != sorted(map(_text, theirs)):
            keys = {key for a, b in zip(mine, theirs, strict=False) for key in a if a[key] != b.get(key, ...)}
            said = f" in {', '.join(sorted(keys))}" if log == "metrics.jsonl" and keys else ""
            yield f"round {t} is another one than in {log}{said}"


def _timeless(row: dict[str, Any], *other: dict[str, Any]) -> dict[str, Any]:
    """Without how long it took, and without its test, where only one of both was tested: a run that was to be longer or
    shorter at that time tested other rounds."""
    tested = all(one["accuracy"] is not None or one["loss"] is not None for one in (row, *other))
    return {key: x for key, x in row.items() if key != "seconds" and (tested or key not in _TESTED)}


def _text(row: dict[str, Any]) -> str:
    return json.dumps(row, sort_keys=True)


def replay_table(replayed: Replayed, width: int | None) -> list[str]:
    return table(
        [
            Column("rounds", [f"{s.begin} to {s.end - 1}" for s in replayed.stretches], left=True),
            Column("from", [s.start for s in replayed.stretches], left=True),
            Column(
                "the state after them",
                [f"compared with {s.kept}" if s.kept else "-" for s in replayed.stretches],
                1,
                left=True,
            ),
        ],
        width,
    )
