"""Trackers of a run that goes: fed with what is committed, every round once, and never in its way."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lamina.export.feed import rounds
from lamina.export.sink import Sink, opened
from lamina.folder import document
from lamina.store.files import replace

GIVEN = "given.json"  # in export/: how many rounds each tracker was given


class Trackers:
    """Reads the rows that a run has committed, and hands on what a tracker was not given yet, by this process or one
    before it.

    Args:
        folder: of the run.
        names: of trackers.
        info: its run.json.
        told: is told of a tracker that failed, and is no longer fed.
    """

    def __init__(self, folder: Path, names: Sequence[str], info: dict[str, Any], told: Callable[[str, str], None]):
        self._folder, self._info, self._told = folder, info, told
        self._given = {name: _given(folder / "export", name, info["rounds_done"]) for name in names}
        whole = all(given >= info["rounds_done"] for given in self._given.values())
        self._since: dict[str, int] = dict(info["lengths"]) if whole else {}  # until there all have been given all
        self._sinks: dict[str, Sink] = {}
        for name in names:
            self._guarded(name, partial(self._open, name, folder / "export" / name))
        if names:
            self._note()

    def _open(self, name: str, place: Path) -> None:
        place.mkdir(parents=True, exist_ok=True)
        self._sinks[name] = opened(name, place, self._folder, self._given[name])

    def feed(self) -> None:
        until = dict(self._info["lengths"])
        if not self._sinks or until == self._since:
            return
        try:
            for name, sink in list(self._sinks.items()):
                self._guarded(name, partial(self._hand_on, name, sink, until))
            self._since = until
        finally:
            self._note()

    def _hand_on(self, name: str, sink: Sink, until: dict[str, int]) -> None:
        for row, layers in rounds(self._folder, until, self._since):
            if row["round"] >= self._given[name]:  # a run that goes back to an older checkpoint makes it once more
                sink.round(row, layers)
                self._given[name] = row["round"] + 1

    def close(self) -> None:
        for name, sink in list(self._sinks.items()):
            self._guarded(name, sink.close)
        self._sinks.clear()

    def _note(self) -> None:
        with contextlib.suppress(OSError):  # the run itself will say that nothing can be written
            replace(self._folder / "export" / GIVEN, document(self._given))

    def _guarded(self, name: str, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:  # whatever it is: it is the tracker's, not the run's
            self._sinks.pop(name, None)
            self._told(name, f"{type(error).__name__}: {error}")


def _given(exports: Path, name: str, done: int) -> int:
    """Rounds that this tracker has of those that are done."""
    if not done or not (exports / name).is_dir():
        return 0
    try:
        return int(json.loads((exports / GIVEN).read_bytes())[name])
    except (OSError, ValueError, KeyError, TypeError):
        return done  # of an earlier lamina, which wrote this down nowhere
