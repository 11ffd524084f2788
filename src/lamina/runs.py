"""Runs on disk: a federation's rounds with a folder that says everything about them, and can be gone on with.

runs/<experiment>/<NNN>-<method>/
  config.toml       every key resolved; `lamina run config.toml` makes the same run again
  env.json          versions, machine, git commit, data, command
  split.json        examples and labels of every client, and the sha256 of the split
  run.json          status running | done | failed | interrupted, totals, final sha256, engine and why
  metrics.jsonl  layers.jsonl  bytes.jsonl  events.jsonl  (clients.jsonl by choice)
  checkpoints/      the newest two, and the best
  model.safetensors the global model's whole state_dict
  crash.txt         after a crash
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from lamina import checkpoint, wire
from lamina.engine import bits, cores, mkl, processes
from lamina.errors import LaminaError, StorageError, expect
from lamina.export.live import Trackers
from lamina.export.sink import expect_installed, expect_known
from lamina.federation import Federation
from lamina.folder import (
    CLIENTS,
    LOGS,
    VERSION,
    Book,
    Row,
    best_of,
    counts,
    document,
    locked,
    now,
    other_settings,
    read_environment,
    read_info,
    read_rows,
    restore,
    result,
    split_document,
    storing,
)
from lamina.machine import content, environment
from lamina.method import Chain, Method
from lamina.record import RoundRecord
from lamina.redaction import hidden
from lamina.settings import CHANGEABLE, is_among
from lamina.state import State
from lamina.stop import Stop
from lamina.store import ClientStore
from lamina.store.files import replace, rewrite, sync

if TYPE_CHECKING:
    from lamina.config import Config


class Watcher(Protocol):
    """Looks on while a run goes."""

    def begin(self, run: Run, fed: Federation) -> None: ...
    def round(self, row: Row) -> None: ...
    def note(self, text: str) -> None: ...
    def end(self, run: Run) -> None: ...


class Interrupted(KeyboardInterrupt):
    """Ctrl-C was pressed once, or SIGTERM or SIGHUP came: the round was finished and committed. `run` can be gone on
    with; `exit_code` is 128 and the number of the signal."""

    def __init__(self, run: Run):
        configured = (run.path / "config.toml").is_file()
        how = f"lamina resume {run.path}" if configured else f"lamina.runs.resume({str(run.path)!r}, fed=fed)"
        super().__init__(f"interrupted after round {run.info['rounds_done']}; {how}")
        self.run = run
        self.exit_code: int = run.info["exit_code"]


class Run:
    """A run folder, finished or not.

    Attributes:
        path: the folder.
        info: run.json.
        records: a row per round.
    """

    def __init__(
        self, path: Path, info: dict[str, Any], records: list[Row], fed: Federation | None, state: State | None
    ):
        self.path = path
        self.info = info
        self.records = records
        self._fed = fed
        self._state = state

    @classmethod
    def open(cls, path: str | Path, *, fed: Federation | None = None) -> Run:
        """What is in a run folder, as far as it is committed.

        Args:
            fed: the federation it was made by; needed for `state` and `model` of runs that were not made from a config.

        Raises:
            StorageError: E403 when there is no run at `path`, E404 when its files are damaged.
        """
        folder = Path(path)
        info = read_info(folder)
        return cls(folder, info, read_rows(folder, info["lengths"].get("metrics.jsonl", 0)), fed, None)

    def __repr__(self) -> str:
        return (
            f"Run({str(self.path)!r}, {self.info['status']}, {self.info['rounds_done']}/{self.info['rounds']} rounds)"
        )

    @property
    def state(self) -> State:
        if self._state is None:
            newest = checkpoint.latest(self.path / "checkpoints")
            if newest is None:
                raise StorageError("no checkpoint that is whole", code="E404", where=str(self.path))
            self._state, _ = checkpoint.read(newest, self._federation())
        return self._state

    @property
    def model(self) -> nn.Module:
        """A plain module with the final weights, in eval mode; where the run has not come to an end, with those of its
        newest checkpoint."""
        if self._fed is not None and self._state is not None:
            return self._fed.module(self._state)
        saved = self._saved()
        return self._federation().module(self.state) if saved is None else saved

    def _saved(self) -> nn.Module | None:
        """model.safetensors, if it is what the run ended with."""
        fed = self._federation()
        made = fed.model
        try:
            made.load_state_dict(load_file(self.path / "model.safetensors"))
        except (OSError, RuntimeError, SafetensorError):
            return None
        tensors: dict[str, torch.Tensor] = {**dict(made.named_parameters()), **dict(made.named_buffers())}
        params, buffers = ({n: tensors[n] for n in part if n in tensors} for part in fed.initial)
        same = State(params, buffers, (), ClientStore()).sha256() == self.info["final_sha256"]
        return made.eval() if same else None

    @property
    def final(self) -> Row | None:
        """The last tested round in sync: in others the global model holds layers that wait."""
        return next((row for row in reversed(self.records) if counts(row)), None)

    @property
    def best(self) -> Row | None:
        """The round in sync with the highest accuracy (the lowest loss, where there is no accuracy)."""
        return best_of(self.records, self.personal)

    @property
    def personal(self) -> bool:
        """Whether clients keep models of their own and the global one is not trained: then theirs is the accuracy."""
        return bool(self.info["personal"])

    def summary(self) -> str:
        """A table for people: accuracy by round, thinned, and the totals."""
        from lamina.terminal import summary

        return summary(self)

    def report(self, path: str | Path | None = None) -> Path:
        """Writes what happened, layer by layer, as one HTML file that needs nothing else.

        Args:
            path: where to; None: report.html in the run's folder.
        """
        from lamina import report

        return report.write([self], report.place_for([self]) if path is None else path)

    def _repr_html_(self) -> str:
        """Cards and a curve, for notebooks."""
        from lamina import report

        return report.cards_html(self)

    def _federation(self) -> Federation:
        if self._fed is None:
            from lamina.config import build

            self._fed = build(self._config())
        return self._fed

    def _config(self, keys: Sequence[str] = ()) -> Config:
        """config.toml with these keys over it, and an engine that gives the bits of the one that the run began with."""
        if not (self.path / "config.toml").is_file():
            raise StorageError(
                f"{self.path} was not made from a config, so its model cannot be rebuilt",
                code="E405",
                remedy="give the federation: lamina.runs.resume(path, fed=fed); to look at it, Run.open(path, fed=fed)",
            )
        from lamina.config import load

        config = load(self.path / "config.toml", keys, env={})
        if config.origin("engine").startswith("command line") and config.engine != "auto":
            return config
        engine = self.info["engine"]
        if bits(engine) == "one thread":
            several = cores() > 1 and (processes.available() or config.engine == "processes")
            engine = "processes" if several and config.engine != "loop" else "loop"
        return config.model_copy(update={"engine": engine})


def fit(
    fed: Federation,
    rounds: int,
    out: str | Path | None = None,
    *,
    root: str | Path | None = None,
    evaluate_every: int | None = None,
    checkpoint_every: int | Literal["auto"] | None = None,
    keep_clients_log: bool | None = None,
    track: Sequence[str] | None = None,
    stop: Stop | None = None,
    progress: bool | Watcher = True,
    config: Config | None = None,
) -> Run:
    """Runs a federation into a folder.

    Args:
        rounds: how many.
        out: a folder that does not hold a run yet; None: runs/<name>/<NNN>-<method>, by the name of the config, without
            one of the data.
        root: what stands for `runs` there; None: LAMINA_RUNS, else ./runs.
        evaluate_every: test after every so many rounds, and after the last; None: as the config says, without one 1.
        checkpoint_every: rounds between two commits; "auto": as often as costs 2 % of the time. The last round, and the
            one that Ctrl-C or an error ends, are committed in any case. None: as the config says, without one "auto".
        keep_clients_log: write clients.jsonl, the bytes of every client in every round; None: as the config says,
            without one no.
        track: trackers that are given every committed round, see `lamina.export`; None: as the config says, without one
            none.
        stop: what ends the run before its last round; None: as the config says, without one nothing.
        progress: show it, or who looks on.
        config: what the federation was built from; without it the folder cannot be resumed by itself.

    Raises:
        StorageError: E401 the disk is full (the last commit is intact), E402 `out` holds a run already. What the
            clients' store refuses (E402, E404 to E406) it refuses before there is a folder.
        Interrupted: Ctrl-C, after the round was committed. A second Ctrl-C stops at once.
    """
    expect(isinstance(rounds, int) and rounds >= 1, f"rounds={rounds}: expected a whole number >= 1", where="rounds")
    if evaluate_every is None:
        evaluate_every = 1 if config is None else config.evaluate_every
    if checkpoint_every is None:
        checkpoint_every = "auto" if config is None else config.run.checkpoint_every
    if keep_clients_log is None:
        keep_clients_log = False if config is None else config.run.keep_clients_log
    whole = checkpoint_every == "auto" or (isinstance(checkpoint_every, int) and checkpoint_every >= 1)
    expect(whole, f"checkpoint_every={checkpoint_every}: expected 'auto' or a whole number >= 1")
    if fed.privacy is not None and fed.privacy.dp.noise_seed == "system":
        checkpoint_every = 1  # a round that is made again has other noise, and counts again: at most one may be lost
    if track is None:
        track = () if config is None else config.run.track
    if stop is None:
        stop = Stop() if config is None else Stop(**config.stop.model_dump())
    expect_known(track)
    expect_installed(track, "track" if config is None else config.origin("run.track"))
    title = method_title(fed.method) if config is None else config.method_title
    if out is not None and (Path(out) / "run.json").exists():
        raise StorageError(
            f"{out} holds a run already",
            code="E402",
            where="out",
            remedy="another folder, or "
            + ("`lamina.runs.resume(path, fed=fed)`" if config is None else "`lamina resume`"),
        )
    fed.store.shelf.begin()
    folder = new_folder(fed.data.name if config is None else config.name, title, root) if out is None else Path(out)
    with _starting(folder), locked(folder):
        options = {
            "evaluate_every": evaluate_every,
            "checkpoint_every": checkpoint_every,
            "keep_clients_log": keep_clients_log,
            "track": list(track),
            "stop": {key: value for key, value in dataclasses.asdict(stop).items() if value is not None},
        }
        book = Book(folder, _fresh_info(fed, rounds, options, config, title))
        with storing(folder):
            if config is not None:
                from lamina.config import to_toml

                replace(folder / "config.toml", to_toml(config).encode())
            began = {} if config is None else {"config": config.settings, "entries": config.entry_sha256}
            replace(folder / "env.json", document(environment(fed) | began))
            rewrite(folder / "split.json", split_document(fed.data))
            for log in book.logs:
                (folder / log).write_bytes(b"")
            book.save()
            sync(folder)
            for above in list(folder.absolute().parents)[:2]:  # they may have been made for it
                with contextlib.suppress(OSError):  # they are not ours, and need not be readable
                    sync(above)
        return _drive(fed, book, Run(folder, book.info, [], fed, None), rounds, _watcher(progress))


def resume(
    path: str | Path,
    rounds: int | None = None,
    *,
    keys: Sequence[str] = (),
    fed: Federation | None = None,
    progress: bool | Watcher = True,
) -> Run:
    """Goes on with a run from its newest good checkpoint, as if it had never stopped.

    Args:
        rounds: in total; None: as many as it was to have.
        keys: `key=value` over the run's config, of those in `lamina.settings.CHANGEABLE`.
        fed: for a run that was not made from a config.

    Raises:
        StorageError: E403 no run, E404 nothing whole to go on from, E405 another config, model, engine or other data,
            or a key that cannot change, E406 it is running now.
    """
    folder = Path(path)
    run = Run(folder, read_info(folder), [], fed, None)
    changed = changes(folder, keys)
    total = changed.get("rounds", run.info["rounds"]) if rounds is None else rounds
    done = run.info["rounds_done"]
    whole = isinstance(total, int) and total >= 1
    expect(whole, f"rounds={total!r}: expected a whole number >= 1", code="E103", where="rounds")
    if total < done or (total == done and run.info["status"] == "done"):
        expect(total == done, f"rounds={total}: this run has done {done}", code="E103", where="rounds")
        return Run.open(folder, fed=fed)
    with locked(folder):
        config = None if fed is not None else run._config(keys)
        fed, warning = _as_it_began(run, config, total)
        state, lengths, passed = restore(folder, fed, run.info["lengths"])
        more = "stopped" in run.info  # whoever goes on with a run that ended early wants more than ended it
        info = run.info | {"rounds": total, "status": "running", "lengths": lengths, "error": None, "exit_code": None}
        info.pop("stopped", None)
        info |= {"rounds_done": state.round if state else 0, "final_sha256": None}
        info["options"] = _options(info["options"], changed)
        info |= {"engine": fed.engine, "workers": fed.workers, "cores": cores()}
        info |= {"bytes_up": state.bytes_up if state else 0, "bytes_down": state.bytes_down if state else 0}
        info["engine_reason"] = run.info.get("engine_reason") if fed.engine == run.info["engine"] else "same bits"
        if config is not None:
            info["config_sha256"] = config.model_copy(update={"rounds": total}).sha256
        records = read_rows(folder, lengths["metrics.jsonl"])
        again = Run(folder, info, records, fed, state)
        del state  # `again` takes the next ones in its place, so that its rows can go
        info |= {"best": result(again.best), "final": result(again.final)}
        book = Book(folder, info, again.best, _kept(again))
        fed.store.shelf.claim()
        with storing(folder):
            book.save()
            (folder / "model.safetensors").unlink(missing_ok=True)  # until the end, the newest checkpoint is the model
            for log, length in lengths.items():
                os.truncate(folder / log, length)
            if (folder / "config.toml").is_file():
                _rewrite_config(folder / "config.toml", changed | {"rounds": total})
            if config is not None:
                replace(folder / "env.json", document(read_environment(folder) | {"config": config.settings}))
        watcher = _watcher(progress)
        for damaged in passed:
            book.event({"event": "passed over", "code": "E404", "message": f"{damaged} is damaged"})
            watcher.note(f"E404  {damaged} is damaged: going on from the one before; the result stays the same")
        if warning:
            book.event({"event": "other cores", "message": warning})
            watcher.note(warning)
        at = info["rounds_done"]
        book.event({"event": "resumed", "round": at, "torch": mkl.label()})
        return _drive(fed, book, again, total - at, watcher, more)


def changes(path: str | Path, keys: Sequence[str]) -> dict[str, Any]:
    """Key -> value, of `key=value` for a run that has begun. Raises StorageError E405 for one that cannot change."""
    folder = Path(path)
    run = Run(folder, read_info(folder), [], None, None)

    def refuse(key: str, number: int, why: str = "", remedy: str | None = None) -> StorageError:
        message = f"{key} cannot change in a run that has begun{why}"
        return StorageError(message, code="E405", where=f"command line, argument {number}", remedy=remedy)

    if not keys:
        return {}
    for number, argument in enumerate(keys, start=2):
        key = argument.partition("=")[0]
        if not is_among(key, CHANGEABLE):
            raise refuse(key, number, remedy=f"what can: {', '.join(CHANGEABLE)}")
    tree = run._config(keys).model_dump(mode="json")
    found: dict[str, Any] = {}
    for number, argument in enumerate(keys, start=2):
        key = argument.partition("=")[0]
        section, _, name = key.partition(".")
        found[key] = tree[section][name] if name else tree[section]
        if key == "run.keep_clients_log" and found[key] != run.info["options"]["keep_clients_log"]:
            raise refuse(key, number, ": clients.jsonl would lack the rounds before, or those that come")
    return found


def _options(before: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """How the run is kept from here on."""
    options = {**before, "stop": dict(before.get("stop", {}))}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        if section == "run" and (name in options or name == "track"):
            options[name] = value
        elif section == "stop":
            options["stop"][name] = value
    stop = dataclasses.asdict(Stop(**options["stop"]))
    return options | {"stop": {name: value for name, value in stop.items() if value is not None}}


def _kept(run: Run) -> Row | None:
    """The best of those rounds after which there is a checkpoint."""
    done = [int(place.name.rpartition("-")[2]) for place in checkpoint.committed(run.path / "checkpoints")]
    return best_of([run.records[n - 1] for n in done if 0 < n <= len(run.records)], run.personal)


def _rewrite_config(place: Path, values: Mapping[str, Any]) -> None:
    """config.toml with other values for these keys, where they are others."""
    from lamina.config import literal, load
    from lamina.settings import with_values

    tree = load(place, env={}).model_dump(mode="json")
    other: dict[tuple[str, ...], str] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        if value != (tree[section][name] if name else tree[section]):
            other[tuple(key.split("."))] = literal(value)
    if other:
        replace(place, with_values(place.read_text(encoding="utf-8"), other, "lamina resume").encode())


def rebuilt(run: Run) -> tuple[Federation, str | None]:
    """The federation that a run was made by, if nothing that changes the result is other than it was, and what must be
    said about the engine. Raises StorageError E405."""
    return _as_it_began(run, None if run._fed is not None else run._config(), run.info["rounds"])


def _as_it_began(run: Run, config: Config | None, total: int) -> tuple[Federation, str | None]:
    """The federation to go on with, if nothing that changes the result is other than when the run began, and what must
    be said about the engine. Raises StorageError E405."""
    folder, info = run.path, run.info

    def refuse(message: str, remedy: str | None = None) -> StorageError:
        return StorageError(message, code="E405", where=str(folder), remedy=remedy)

    other = [] if config is None else other_settings(folder, config, resuming=True)
    if other:
        raise refuse(
            f"config.toml is not what this run was started with: {', '.join(other)}",
            "put it back, or start another run: lamina run config.toml",
        )
    fed = run._federation() if config is None else _built(run, config)
    recorded = read_environment(folder)
    data, held = recorded["data"], content(fed.data)
    if fed.data.fingerprint != data["fingerprint"] or data.get("content", held) != held:
        raise refuse("the data is not what this run was started on")
    if fed.frozen != recorded.get("frozen", fed.frozen):
        raise refuse("the parameters that are not trained are not those this run was started with")
    spec = fed.local.schedule
    if total != info["rounds"] and isinstance(spec, str) and "cosine" in spec.split():
        raise refuse(
            f"rounds={total}: local.schedule={spec!r} runs over the {info['rounds']} rounds that were asked for, so "
            "the result would be that of no config",
            f'a run that is to go on later needs a length: local.schedule="cosine:{total}"',
        )
    if bits(fed.engine) != bits(info["engine"]):
        raise refuse(
            f"engine={fed.engine!r}: this run was begun with {info['engine']!r}, which gives other bits",
            f"Federation(..., engine={info['engine']!r})",
        )
    if fed.engine == "threads" and info.get("cores", cores()) != cores():
        return fed, (
            f"this run was begun on {info['cores']} cores and goes on with {cores()}: with engine='threads' the result "
            "is not bit-identical to that of an uninterrupted run"
        )
    return fed, None


def _built(run: Run, config: Config) -> Federation:
    from lamina.config import build

    run._fed = build(config)
    return run._fed


@contextlib.contextmanager
def _starting(folder: Path) -> Iterator[None]:
    """The folder, made; gone again, and `latest` with it, when something fails before there is a run in it."""
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        empty = not any(folder.iterdir())
    try:
        yield
    except BaseException:
        if empty:
            discard(folder)
        raise


def new_folder(experiment: str, method: str, root: str | Path | None = None) -> Path:
    """Makes runs/<experiment>/<NNN>-<method> with the next free number, and points runs/latest at it."""
    top = runs_root(root)
    parent = experiment_folder(experiment, top)
    with storing(parent):
        parent.mkdir(parents=True, exist_ok=True)
        number = max((number_of(p) for p in parent.iterdir()), default=0) + 1
        while True:
            folder = parent / f"{number:03d}-{_as_name(method)}"
            try:
                folder.mkdir()
                break
            except FileExistsError:
                number += 1  # another process was faster
    with contextlib.suppress(OSError):  # file systems without links
        link = top / f".latest-{os.getpid()}"
        link.symlink_to(folder.relative_to(top), target_is_directory=True)
        link.replace(top / "latest")
    return folder


def number_of(folder: Path) -> int:
    """Of a run, among those of its experiment; 0 for a folder that has none."""
    found = re.match(r"(\d{3,})-", folder.name)
    return int(found[1]) if found else 0


def experiment_folder(experiment: str, top: Path) -> Path:
    return top / (_as_name(experiment.replace("+", "-")).strip(".-") or "experiment")


def _as_name(text: str) -> str:
    """Within one folder, whatever somebody has called it."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text)[:100]


def discard(folder: Path) -> None:
    """Takes away a new folder in which no run has begun, and `latest` with it."""
    if (folder / "run.json").exists():
        return
    link = folder.parent.parent / "latest"
    with contextlib.suppress(OSError):
        if link.is_symlink() and link.resolve() == folder.resolve():
            link.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def runs_root(root: str | Path | None = None) -> Path:
    return Path(root or os.environ.get("LAMINA_RUNS") or "runs")


def method_title(method: Method[Any, Any]) -> str:
    parts = method.methods if isinstance(method, Chain) else (method,)
    return "+".join(type(part).__name__.lower() for part in parts)


def codec_title(codec: Any) -> str:
    """``"fp32"``, ``"topk:0.01:sign"``: the name and what is not as usual."""
    name = next((name for name, kind in wire.CODECS.items() if type(codec) is kind), type(codec).__name__)
    if name == "dense":
        return str(codec.values)
    fields = dataclasses.fields(codec) if dataclasses.is_dataclass(codec) else ()
    said = [str(getattr(codec, f.name)) for f in fields if getattr(codec, f.name) != f.default]
    return ":".join([name, *said])


# ---- the rounds


def _drive(fed: Federation, book: Book, run: Run, rounds: int, watcher: Watcher, more: bool = False) -> Run:
    """The rounds, into the folder.

    Args:
        more: what its last round has reached was known before, and does not end the run again.
    """
    with Interrupts() as interrupts:
        _rounds(fed, book, run, rounds, watcher, more, interrupts)
    if book.info["status"] == "interrupted":
        raise Interrupted(run)
    return run


def _rounds(
    fed: Federation, book: Book, run: Run, rounds: int, watcher: Watcher, more: bool, interrupts: Interrupts
) -> None:
    records = run.records
    options = book.info["options"]
    every = options["checkpoint_every"]
    watcher.begin(run, fed)

    def lost(tracker: str, why: str) -> None:
        book.event({"event": "tracker failed", "tracker": tracker, "message": why})
        watcher.note(hidden(f"{tracker} failed and is told nothing more: {why}"))

    trackers = Trackers(book.folder, options.get("track", ()), book.info, lost)
    hold, total = fed.method.hold, book.info["rounds"]
    stop = Stop(**options.get("stop", {}))
    passed = stop.reached(records[-1], run.personal, book.seconds) if records else {}
    stopped = "" if more else " · ".join(passed.values())  # it was killed when it had just come to its end
    if fed.method.compensates and fed.uplink.lossless:
        title, codec = method_title(fed.method), codec_title(fed.uplink)
        watcher.note(f"{title} sends later what the uplink loses, and {codec} loses nothing: try uplink=topk:0.02")
    if total % hold:
        watcher.note(f"rounds={total} is no multiple of {hold}: the run may end with layers waiting")
    try:
        trackers.feed()  # what the process before committed and had no time to hand on
        if rounds and not stopped:
            going = fed.run(rounds, run._state, evaluate_every=options["evaluate_every"])
            with contextlib.closing(cast("Generator[tuple[State, RoundRecord]]", going)):
                for state, record in going:
                    row = book.round(state, record, records[-1] if records else None)
                    records.append(row)
                    run._state = state
                    watcher.round(row)
                    for event in record.events:
                        watcher.note(hidden(_told(event, record)))
                    reached = stop.reached(row, run.personal, book.seconds)
                    stopped = " · ".join(said for name, said in reached.items() if name not in passed)
                    last = state.round == total or bool(stopped)
                    if interrupts.asked or last or book.due(every, state.round):
                        book.commit(state)
                        trackers.feed()
                    if stopped or (interrupts.asked and not last):
                        break
        if stopped:
            book.info["stopped"] = stopped
            watcher.note(f"stopped after round {book.info['rounds_done'] - 1}: {stopped}")
        interrupted = book.info["rounds_done"] < total and not stopped
        code = interrupts.exit_code if interrupted else 0
        trackers.close()
        book.finish(fed, run._state, "interrupted" if interrupted else "done", code)
    except KeyboardInterrupt:
        book.fail("interrupted", interrupts.exit_code, "interrupted")
        raise
    except StorageError as error:
        book.fail("failed", error.exit_code, str(error))
        raise
    except LaminaError as error:
        book.last_words(run._state)
        trackers.feed()
        if interrupts.asked and error.code == "E303":  # the signal went to the worker processes too
            book.fail("interrupted", interrupts.exit_code, "interrupted")
            raise Interrupted(run) from error
        book.fail("failed", error.exit_code, str(error))
        raise
    except Exception as error:
        book.last_words(run._state)
        trackers.feed()
        with contextlib.suppress(OSError):
            replace(book.folder / "crash.txt", hidden(traceback.format_exc()).encode(errors="replace"))
        book.fail("failed", 4, f"{type(error).__name__}: {error}")
        error.add_note(f"the run is {book.folder}, with this error in its crash.txt")
        raise
    finally:
        del records[book.info["rounds_done"] :]  # what is shown is what is committed
        trackers.close()
        watcher.end(run)


def _told(event: Mapping[str, str], record: RoundRecord) -> str:
    what = ": ".join(event[key] for key in ("layer", "why", "message") if key in event)
    who = f"client {event['client']}: " if event["client"] else ""
    return f"round {record.round}: {who}{what}  {event['code']}"


class Interrupts:
    """Ctrl-C once is a wish, twice an order; SIGTERM and SIGHUP, where nobody else handles or ignores them, are a wish
    too. Only in the main thread, where signals arrive."""

    def __init__(self) -> None:
        self.asked = False
        self.exit_code = 130
        self._pipe: tuple[int, ...] = ()

    def __enter__(self) -> Interrupts:
        self._process = os.getpid()
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)
                if number is not None and (name == "SIGINT" or signal.getsignal(number) == signal.SIG_DFL):
                    self._before[number] = signal.signal(number, self._press)
            if self._before and sys.platform != "win32":
                self._pipe = os.pipe()
                for end in self._pipe:
                    os.set_blocking(end, False)
                self._woken = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pipe:
            signal.set_wakeup_fd(self._woken)
            for end in self._pipe:
                os.close(end)
            self._pipe = ()
        for number, before in self._before.items():
            signal.signal(number, before)

    def _presses(self) -> int:
        """How often Ctrl-C was pressed since this was asked before: during a long step Python makes one call of many.
        Workers, which have the same pipe, ignore that signal."""
        try:
            return os.read(self._pipe[0], 4096).count(signal.SIGINT) if self._pipe else 1
        except BlockingIOError:
            return 1

    def _press(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a worker process: it ends with its parent
        self.exit_code = 128 + number
        again = self._presses() > 1
        if self.asked or again:
            self.asked = True
            raise KeyboardInterrupt
        self.asked = True
        with contextlib.suppress(OSError):  # not `print`: this may have interrupted one
            os.write(2, b"\n  finishing this round, then stopping (Ctrl-C again: stop now)\n")


# ---- what is written down about a run


def _fresh_info(
    fed: Federation, rounds: int, options: dict[str, Any], config: Config | None, title: str
) -> dict[str, Any]:
    logs = (*LOGS, CLIENTS) if options["keep_clients_log"] else LOGS
    return {
        "version": VERSION,
        "status": "running",
        "exit_code": None,
        "error": None,
        "method": title,
        "method_repr": repr(fed.method),
        "uplink": codec_title(fed.uplink),
        "downlink": codec_title(fed.downlink),
        "aggregate": fed.aggregate,
        "personal": "personal" in (fed.method.withholds or ""),
        "data": fed.data.name,
        "partition": fed.data.partition,
        "clients": len(fed.data),
        "cohort": fed.cohort,
        "parameters": sum(x.numel() for x in fed.initial.params.values()),
        "seed": fed.seed,
        "split_sha256": fed.data.split_sha256,
        "pool_sha256": fed.data.pool_sha256,
        "initial_sha256": State(*fed.initial, (), ClientStore()).sha256(),
        "final_sha256": None,
        "config_sha256": None if config is None else config.sha256,
        "torch": mkl.label(),
        "engine": fed.engine,
        "engine_reason": fed.engine_reason,
        "workers": fed.workers,
        "cores": cores(),
        "tested": fed.data.test is not None,
        "privacy": None if fed.privacy is None else fed.privacy.facts,
        "secure": None if fed.secure is None else dataclasses.asdict(fed.secure),
        "options": options,
        "rounds": rounds,
        "rounds_done": 0,
        "bytes_up": 0,
        "bytes_down": 0,
        "best": None,
        "final": None,
        "lengths": dict.fromkeys(logs, 0),
        "seconds": 0.0,
        "started": now(),
        "updated": now(),
    }


def _watcher(progress: bool | Watcher) -> Watcher:
    from lamina.terminal import Quiet, Terminal

    if isinstance(progress, bool):
        return Terminal() if progress else Quiet()
    return progress
