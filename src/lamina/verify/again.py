"""A run that was made before, to make some of its rounds once more. Nothing is written into it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lamina import checkpoint
from lamina.engine import mkl
from lamina.errors import StorageError
from lamina.federation import Federation
from lamina.runs import Run, rebuilt
from lamina.state import State

AFRESH = 10  # rounds made once more from the start, where there is no checkpoint to begin at


class Model(NamedTuple):
    """The model after a round that was made once more, and that of a checkpoint or of run.json."""

    round: int
    sha256: str
    where: str
    written: str


def opened(folder: Path, fed: Federation | None) -> tuple[Run, Federation, str | None]:
    """The run, the federation that it was made by, and what must be said about the engine, if anything.

    Raises:
        StorageError: E403 no run, or no round in it; E404 it is damaged; E405 config, data or engine are not what it
            was made with, or nobody can make it again.
    """
    run = Run.open(folder, fed=fed)
    fed, warning = rebuilt(run)
    if fed.privacy is not None and fed.privacy.dp.noise_seed == "system":
        said = "this run's cohorts and noise came from the system and are written nowhere: no bit can be made again"
        raise StorageError(said, code="E405", where=str(folder), remedy="privacy.noise_seed='run' can be")
    if not run.info["rounds_done"]:
        raise StorageError("no round of this run is committed yet", code="E403", where=str(folder))
    if [row.round for row in run.records] != list(range(run.info["rounds_done"])):
        raise StorageError("metrics.jsonl has not one line for each round", code="E404", where=str(folder))
    return run, fed, warning


def expect_same_torch(run: Run, say: Callable[[str], None]) -> None:
    if mkl.label() != run.info["torch"]:
        say(f"this run was made with torch {run.info['torch']}: with {mkl.label()} the last bits may be others")


def span(
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
        if state.round < done:
            start = state  # the newest of them
    if afresh:
        return None, done, written
    return (None, min(done, AFRESH), written) if start is None else (start, done, written)
