"""Trackers: programs that are given numbers round by round. Their packages are imported when one is opened."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from lamina.errors import ConfigError, expect, meant
from lamina.export.feed import Described, Layers, described

TRACKERS = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}  # module here -> package


class Sink(Protocol):
    """Written to, never read."""

    def round(self, row: Mapping[str, Any], layers: Layers) -> None: ...
    def close(self) -> None: ...


class Tracker(Protocol):
    """A module of this folder."""

    def open_sink(self, place: Path, run: Described, done: int) -> Sink:
        """Args: done: rounds that a process which has ended gave before."""


def opened(name: str, place: Path, folder: Path, done: int) -> Sink:
    tracker: Tracker = importlib.import_module(f"lamina.export.{name}")
    return tracker.open_sink(place, described(folder), done)


def expect_known(names: Iterable[str]) -> None:
    """Raises ConfigError E103 for a name that is no tracker."""
    for name in names:
        message = f"track: expected {', '.join(TRACKERS)}; got {name!r}"
        expect(name in TRACKERS, message, code="E103", where="track", remedy=meant(str(name), TRACKERS) or None)


def expect_installed(names: Iterable[str], where: str) -> None:
    """Raises ConfigError E118 for a tracker whose package is not here."""
    for name in names:
        if importlib.util.find_spec(TRACKERS[name]) is None:
            message = f"{name} needs its package, which is not installed"
            raise ConfigError(message, code="E118", where=where, remedy="pip install 'lamina[track]'")
