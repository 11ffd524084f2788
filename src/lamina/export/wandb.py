"""A run for Weights & Biases, never online: `wandb sync PLACE/wandb/offline-run-*` is up to the user."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lamina.export.feed import Described, Layers, scalars
from lamina.export.sink import Sink


class _Offline:
    def __init__(self, run: Any):
        self._run = run

    def round(self, row: Mapping[str, Any], layers: Layers) -> None:
        self._run.log(scalars(row, layers), step=row["round"])

    def close(self) -> None:
        self._run.finish()


def open_sink(place: Path, run: Described, done: int) -> Sink:
    folders = {f"WANDB_{what}_DIR": str(place / what.lower()) for what in ("CACHE", "CONFIG", "DATA")}
    os.environ |= {"WANDB_ERROR_REPORTING": "false", **folders}  # nothing beside the run folder
    import wandb

    silence: dict[str, Any] = {"silent": True, "console": "off", "disable_git": True, "disable_code": True}
    quiet = wandb.Settings(**silence, x_disable_stats=True, x_disable_meta=True)
    named: dict[str, Any] = {"project": run.experiment, "name": run.name, "id": run.identity, "dir": str(place)}
    return _Offline(wandb.init(**named, mode="offline", config=run.settings, settings=quiet, reinit="create_new"))
