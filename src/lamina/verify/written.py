"""What is written in a run folder, compared with itself: checksums, the chain of checkpoints, lengths, sums."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from safetensors import SafetensorError
from safetensors.torch import load_file

from lamina import checkpoint
from lamina.errors import LaminaError, StorageError
from lamina.folder import CLIENTS, Row, read_info, read_log, read_rows
from lamina.state import State
from lamina.store import ClientStore
from lamina.terminal import Column, table

DIRECTIONS = ("up", "down")

Accounts: TypeAlias = Counter[tuple[int, str]]  # (round, direction) -> bytes


class Check(NamedTuple):
    file: str
    said: str  # what was compared
    problem: str | None


def files(folder: Path) -> list[Check]:
    """One for every file of a run that is read again. Raises StorageError when run.json cannot be read."""
    here = Written(folder, read_info(folder))
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
        checks.append(_checked(place.name, "checksums; chain; bytes as in metrics.jsonl", _checkpoint(here, place)))
    if here.info["final_sha256"] is not None:
        checks.append(_checked("model.safetensors", "sha256 as in run.json", _model(here)))
    return checks


class Written:
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

    @property
    def unused(self) -> Accounts:
        """Of the rounds, what came and was no answer that was owed: that of a client outside the cohort has no row."""
        sums: Accounts = Counter()
        for (t, phase, direction, layer), n in self.traffic.items():
            sums[t, direction] += n if (phase, layer) == ("round", "_unused") else 0
        return sums

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


def _whole(here: Written, log: str) -> Iterator[str]:
    """Whether the file still has what was committed, in whole lines."""
    length = here.info["lengths"][log]
    with (here.folder / log).open("rb") as file:
        head = file.read(length)
    if len(head) < length:
        yield f"{len(head):,} bytes, run.json says {length:,}"
    elif head and not head.endswith(b"\n"):
        yield f"no line ends at byte {length:,}, where run.json says one does"


def _metrics(here: Written) -> Iterator[str]:
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


def _bytes(here: Written) -> Iterator[str]:
    yield from _whole(here, "bytes.jsonl")
    said = Counter({(row.round, way): getattr(row, f"bytes_{way}") for row in here.rows for way in DIRECTIONS})
    yield from _differ(here.sums("round", "probe"), said, "metrics.jsonl")


def _layers(here: Written) -> Iterator[str]:
    yield from _whole(here, "layers.jsonl")
    for row in read_log(here.folder / "layers.jsonl", here.info["lengths"]["layers.jsonl"]):
        for direction in DIRECTIONS:
            n, said = row[f"bytes_{direction}"], here.traffic[row["round"], "round", direction, row["layer"]]
            if n != said:
                yield f"round {row['round']}, {direction}, {row['layer']}: {n:,} bytes, bytes.jsonl says {said:,}"


def _clients(here: Written) -> Iterator[str]:
    yield from _whole(here, CLIENTS)
    sums: Accounts = Counter()
    for row in read_log(here.folder / CLIENTS, here.info["lengths"][CLIENTS]):
        for direction in DIRECTIONS:
            sums[row["round"], direction] += row[f"bytes_{direction}"]
    yield from _differ(sums, here.sums("round"), "bytes.jsonl", here.unused)


def _differ(sums: Accounts, said: Accounts, where: str, spare: Accounts | None = None) -> Iterator[str]:
    """Args: spare: of what is said, bytes that may be in no row."""
    for t, direction in sorted({*sums, *said}):
        n, other = sums[t, direction], said[t, direction]
        least = other - (spare[t, direction] if spare else 0)
        if not least <= n <= other:
            yield f"round {t}, {direction}: its rows add up to {n:,} bytes, {where} says {other:,}"


def _checkpoint(here: Written, place: Path) -> Iterator[str]:
    if not checkpoint.intact(place):
        if place.is_dir():  # else the run goes on, and has made two newer ones
            yield "its files do not match their checksums"
        return
    other = checkpoint.unlinked(place)
    if other is not None:
        yield other
    state = json.loads((place / "state.json").read_bytes())
    if state["round"] > len(here.rows):  # the run was stopped before run.json knew of it: `resume` begins here
        return
    for direction in DIRECTIONS:
        n = state[f"bytes_{direction}"]
        total = sum(getattr(row, f"bytes_{direction}") for row in here.rows[: state["round"]])
        if n != total:
            yield f"{direction}: {n:,} bytes, metrics.jsonl adds up to {total:,} in these {state['round']} rounds"


def _model(here: Written) -> Iterator[str]:
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


def files_table(checks: Sequence[Check], width: int | None) -> list[str]:
    return table(
        [
            Column("file", [check.file for check in checks], left=True),
            Column("", ["fails" if check.problem else "holds" for check in checks], left=True),
            Column("", [check.problem or check.said for check in checks], left=True),
        ],
        width,
    )
