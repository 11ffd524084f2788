"""Event files for TensorBoard: `tensorboard --logdir PLACE`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lamina.export.feed import Described, Layers, scalars
from lamina.export.sink import Sink


class _Events:
    def __init__(self, writer: Any):
        self._writer = writer

    def round(self, row: Mapping[str, Any], layers: Layers) -> None:
        for key, value in scalars(row, layers).items():
            self._writer.add_scalar(key, value, row["round"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def open_sink(place: Path, run: Described, done: int) -> Sink:
    from torch.utils.tensorboard.writer import SummaryWriter

    writer = SummaryWriter(str(place / run.experiment / run.name), purge_step=done or None)
    settings = "\n".join(f"    {key} = {value!r}" for key, value in run.settings.items())
    writer.add_text("settings", settings, 0)
    return _Events(writer)
