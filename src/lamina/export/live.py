"""Trackers of a run that goes: fed with what is committed, and never in its way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lamina.export.feed import rounds
from lamina.export.sink import Sink, opened


class Trackers:
    """Reads the rows that a run has committed since the last time, and hands them on.

    Args:
        folder: of the run.
        names: of trackers.
        info: its run.json; what is committed by now was handed on by the process before.
        told: is told of a tracker that failed, and is no longer fed.
    """

    def __init__(self, folder: Path, names: Sequence[str], info: dict[str, Any], told: Callable[[str, str], None]):
        self._folder, self._info, self._told = folder, info, told
        self._fed: dict[str, int] = dict(info["lengths"])
        self._sinks: dict[str, Sink] = {}
        for name in names:
            place = folder / "export" / name
            self._guarded(name, partial(self._open, name, place))

    def _open(self, name: str, place: Path) -> None:
        place.mkdir(parents=True, exist_ok=True)
        self._sinks[name] = opened(name, place, self._folder, self._info["rounds_done"])

    def feed(self) -> None:
        if not self._sinks:
            return
        since, self._fed = self._fed, dict(self._info["lengths"])
        for name, sink in list(self._sinks.items()):
            self._guarded(name, partial(self._hand_on, sink, since))

    def _hand_on(self, sink: Sink, since: dict[str, int]) -> None:
        for row, layers in rounds(self._folder, self._fed, since):
            sink.round(row, layers)

    def close(self) -> None:
        for name, sink in list(self._sinks.items()):
            self._guarded(name, sink.close)
        self._sinks.clear()

    def _guarded(self, name: str, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:  # whatever it is: it is the tracker's, not the run's
            self._sinks.pop(name, None)
            self._told(name, f"{type(error).__name__}: {error}")
