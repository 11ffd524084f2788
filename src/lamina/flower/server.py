"""The server: our own rounds on Flower's Grid, with our run folder, checkpoints and exit codes."""

from __future__ import annotations

import io
import json
import secrets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from rich.console import Console

from lamina import runs, terminal
from lamina.config import Config, build, data_of
from lamina.data import ClientData
from lamina.errors import LaminaError, StorageError
from lamina.federation import Federation
from lamina.flower.post import Carried, GridPost
from lamina.flower.rollcall import RollCall
from lamina.flower.settings import RunKeys, back, expect_together, keys_of, loaded
from lamina.folder import Row, finite, other_settings
from lamina.redaction import hidden, hidden_in, printable
from lamina.remote import AtServer, over, register
from lamina.runs import Run
from lamina.store.files import replace

NOTES = "flower.json"  # in a run folder: under which name nodes keep what they remember
CARRIED = "flower.jsonl"  # in a run folder: what Flower carried, a row per round
LETTERS = "letters.json"  # in a run folder, where letters are signed: from where they are numbered


def server_app(config: str | Path) -> ServerApp:
    """What Flower runs at the server.

    Args:
        config: of the experiment, beside the app.
    """
    app: Any = ServerApp()

    def main(grid: Grid, context: Context) -> None:
        keys = RunKeys.of(context.run_config)
        with Report(keys.report) as report:
            try:
                _apart(lambda: serve(Path(config), keys, grid, report))
            except BaseException as error:
                report.failed(error)
                raise

    app.main()(main)
    return app


def _apart(work: Callable[[], Any]) -> None:
    """In a thread of its own. Signals stay Flower's, by which it ends this process when the SuperLink is gone: a round
    that waits for its answers would go on for ever. Nothing is lost, as every round is committed."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="lamina", daemon=True)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def serve(path: Path, keys: RunKeys, grid: Any, report: Report) -> Run:
    """A run from its first round to its last, or from where it stopped. Raises LaminaError."""
    config = loaded(path)
    if keys.together:
        expect_together(config)
    rounds = keys.rounds or config.rounds
    folder = _resumed(keys, config) if keys.resume else None
    experiment = f"{config.name}-{secrets.token_hex(8)}" if folder is None else _experiment(folder)
    own = data_of(config) if keys.evaluate else None
    signs = keys_of(config)
    signing = None if signs is None else AtServer(signs, experiment)
    call = RollCall(grid, signing, report.note)
    call.wait(keys.clients or (1 if own is None else len(own)), keys.nodes, keys.wait_s, report.note)
    sizes = register(call.rolls.values())
    fed = build(config, data=_registry(sizes, own))
    post = GridPost(grid, call, [*sizes], experiment, fed.faults.reply_deadline_s, report.note)
    fed = over(fed, post, together=keys.together, signing=signing)
    watcher = Watcher(report, post, experiment, signing)
    if folder is not None:
        return runs.resume(folder, rounds, fed=fed, progress=watcher)
    return runs.fit(
        fed, rounds, root=keys.run_dir or None, config=config, progress=watcher, checkpoint_every=back(config)
    )


def _registry(sizes: Mapping[str, int], own: ClientData | None) -> ClientData:
    if own is None:
        return ClientData.registry(sizes)
    more: dict[str, Any] = {"transform": own.transform, "name": own.name, "partition": own.partition}
    return ClientData.registry(sizes, test=own.test, **more)


def _resumed(keys: RunKeys, config: Config) -> Path:
    """Raises StorageError E403, E405."""
    folder = Path(keys.resume)
    if not folder.is_absolute() and not folder.exists():
        folder = runs.runs_root(keys.run_dir or None) / folder
    other = other_settings(Run.open(folder).path, config, resuming=True)
    if other:
        said = f"the app's config is not what this run was started with: {', '.join(other)}"
        raise StorageError(said, code="E405", where=str(folder), remedy="put it back, or start another run")
    return folder


def _experiment(folder: Path) -> str:
    """Raises StorageError E405 for a run that was not made here."""
    try:
        return str(json.loads((folder / NOTES).read_bytes())["experiment"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = f"{NOTES} is missing or damaged: {error!r}"
        raise StorageError(
            said, code="E405", where=str(folder), remedy="only a run over Flower is resumed so"
        ) from error


def _cut(log: Path, rounds: int) -> bytes:
    """The rows of rounds that are committed."""
    lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
    return b"".join(lines[:rounds])


class Report:
    """What is printed, in a file too: a JSON object per line, for whoever started the run on this machine."""

    def __init__(self, path: str):
        self._file: TextIO | None = Path(path).open("a", encoding="utf-8") if path else None  # noqa: SIM115

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._file is not None:
            self._file.close()

    def put(self, event: str, **values: Any) -> None:
        if self._file is not None:
            self._file.write(json.dumps(hidden_in(finite({"event": event, **values})), ensure_ascii=False) + "\n")
            self._file.flush()

    def line(self, text: str) -> None:
        print(printable(hidden(text)), flush=True)
        self.put("line", text=text)

    def note(self, text: str) -> None:
        self.line(f"  {text}")
        self.put("note", text=text)

    def failed(self, error: BaseException) -> None:
        code = error.exit_code if isinstance(error, LaminaError) else getattr(error, "exit_code", 4)
        said = str(error) if isinstance(error, LaminaError) else f"E300  {type(error).__name__}: {error}"
        self.put("failed", text=said, exit_code=int(code))


class _Lines(io.TextIOBase):
    """Where the progress of a run is printed."""

    def __init__(self, report: Report):
        self._report = report

    def write(self, text: str) -> int:
        for line in text.splitlines():
            self._report.line(line)
        return len(text)


class Watcher:
    """Shows a run, and writes down what Flower carried."""

    def __init__(self, report: Report, post: GridPost, experiment: str, signing: AtServer | None = None):
        self._report = report
        self._signing = signing
        self._post = post
        self._experiment = experiment
        self._before = Carried()
        self._terminal = terminal.Terminal(Console(file=_Lines(report), width=120, no_color=True))  # type: ignore[arg-type]

    def begin(self, run: Run, fed: Federation) -> None:
        self._folder = run.path
        if self._signing is not None:
            self._signing.keep(run.path / LETTERS)
        replace(run.path / NOTES, json.dumps({"experiment": self._experiment}).encode())
        replace(run.path / CARRIED, _cut(run.path / CARRIED, run.info["rounds_done"]))
        self._report.put("begin", run=str(run.path.resolve()), **run.info)
        self._terminal.begin(run, fed)

    def round(self, row: Row) -> None:
        now = self._post.carried
        carried = {key: n - getattr(self._before, key) for key, n in now._asdict().items()}
        self._before = now
        with (self._folder / CARRIED).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"round": row.round, **carried}) + "\n")
        self._report.put("round", **row._asdict())
        self._terminal.round(row)

    def note(self, text: str) -> None:
        self._report.put("note", text=text)
        self._terminal.note(text)

    def end(self, run: Run) -> None:
        self._terminal.end(run)
        self._report.put("end", run=str(run.path.resolve()), **run.info)
