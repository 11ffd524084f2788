"""What a run's files say, for other programs: once (`export`), or as they grow (`live.Trackers`).

RUN/export/<name>/ is where it goes, unless another place is named. Nothing is read back, nothing opens a connection.
"""

from __future__ import annotations

from pathlib import Path

from lamina.errors import StorageError, expect, meant
from lamina.export import files
from lamina.export.feed import rounds
from lamina.export.sink import TRACKERS, expect_installed, opened
from lamina.folder import expect_within, read_info, storing

FORMATS = (*files.WRITERS, *TRACKERS)


def export(folder: Path, to: str, out: Path | None = None) -> list[Path]:
    """Writes a run in another form.

    Args:
        folder: of the run.
        to: one of `FORMATS`.
        out: a folder; None: export/<to> in that of the run. A tracker's may hold other runs.

    Returns:
        What was written: files, or the folder of a tracker.

    Raises:
        ConfigError: E103 an unknown format, E118 a package that is not installed.
        StorageError: E401 what cannot be written, E402 the tracker's folder in the run holds it already, E403 no run,
            E404 damaged files, or no model to write.
    """
    remedy = meant(to, FORMATS) or None
    expect(to in FORMATS, f"{to!r}: expected one of {', '.join(FORMATS)}", code="E103", where="--to", remedy=remedy)
    info = read_info(folder)
    place = folder / "export" / to if out is None else out
    if out is None:
        expect_within(folder)
    if to in files.WRITERS:
        return files.WRITERS[to](folder, info, place)
    expect_installed([to], "--to")
    if out is None and place.is_dir() and any(place.iterdir()):
        remedy = "move it away, or name another folder with --out"
        raise StorageError(f"{place} holds this run already", code="E402", where=str(folder), remedy=remedy)
    with storing(place):
        place.mkdir(parents=True, exist_ok=True)
        sink = opened(to, place, folder, 0)
        for row, layers in rounds(folder, info["lengths"]):
            sink.round(row, layers)
        sink.close()
    return [place]
