"""Runs on disk: a federation's rounds with a folder that says everything about them, and can be gone on with.

runs/<experiment>/<NNN>-<method>/
  config.toml       every key resolved; `lamina run config.toml` makes the same run again
  env.json          versions, machine, git commit, data, command
  split.json        examples and labels of every client, and the sha256 of the split
  run.json          status running | done | failed | interrupted, totals, final sha256, engine and why
  metrics.jsonl  layers.jsonl  bytes.jsonl  events.jsonl  (clients.jsonl by choice)
  checkpoints/      the newest two
  model.safetensors the global model's whole state_dict
  crash.txt         after a crash
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import threading
import traceback
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import torch
from safetensors.torch import load_file
from torch import nn

from lamina import checkpoint, wire
from lamina.data.client_data import POOLED
from lamina.errors import ConfigError, LaminaError, StorageError, expect
from lamina.federation import Federation, State
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
    read_info,
    read_log,
    replace,
    restore,
    result,
    row_of,
    split_document,
    standing,
    storing,
)
from lamina.machine import environment
from lamina.method import Chain, Method
from lamina.record import RoundRecord
from lamina.store import ClientStore

if TYPE_CHECKING:
    from lamina.config import Config


class Watcher(Protocol):
    """Looks on while a run goes."""

    def begin(self, run: Run, fed: Federation) -> None: ...
    def round(self, row: Row) -> None: ...
    def note(self, text: str) -> None: ...
    def end(self, run: Run) -> None: ...


class Interrupted(KeyboardInterrupt):
    """Ctrl-C was pressed once: the round was finished and committed. `run` can be gone on with."""

    def __init__(self, run: Run):
        super().__init__(f"interrupted after round {run.info['rounds_done']}; lamina resume {run.path}")
        self.run = run


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
            StorageError: E403 when there is no run at `path`.
        """
        folder = Path(path)
        info = read_info(folder)
        length = info["lengths"].get("metrics.jsonl", 0)
        return cls(folder, info, [row_of(line) for line in read_log(folder / "metrics.jsonl", length)], fed, None)

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
        """A plain module with the final weights, in eval mode."""
        if self._fed is not None and self._state is not None:
            return self._fed.module(self._state)
        made = self._federation().model
        made.load_state_dict(load_file(self.path / "model.safetensors"))
        return made.eval()

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

    def _federation(self) -> Federation:
        if self._fed is None:
            if not (self.path / "config.toml").is_file():
                raise StorageError(
                    f"{self.path} was not made from a config, so its model cannot be rebuilt",
                    code="E405",
                    remedy="give the federation: Run.open(path, fed=fed), resume(path, fed=fed)",
                )
            from lamina.config import build, load

            self._fed = build(load(self.path / "config.toml", env={}))
        return self._fed


def fit(
    fed: Federation,
    rounds: int,
    out: str | Path | None = None,
    *,
    evaluate_every: int | None = None,
    checkpoint_every: int | Literal["auto"] | None = None,
    keep_clients_log: bool | None = None,
    progress: bool | Watcher = True,
    config: Config | None = None,
) -> Run:
    """Runs a federation into a folder.

    Args:
        rounds: how many.
        out: a folder that does not hold a run yet; None: runs/<data>/<NNN>-<method> (LAMINA_RUNS moves `runs`).
        evaluate_every: test after every so many rounds, and after the last; None: as the config says, without one 1.
        checkpoint_every: rounds between two commits; "auto": as often as costs a twentieth of the time. The last
            round, and the one that Ctrl-C or an error ends, are committed in any case. None: as the config says,
            without one "auto".
        keep_clients_log: write clients.jsonl, the bytes of every client in every round; None: as the config says,
            without one no.
        progress: show it, or who looks on.
        config: what the federation was built from; without it the folder cannot be resumed by itself.

    Raises:
        StorageError: E401 the disk is full (the last commit is intact), E402 `out` holds a run already.
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
    title = method_title(fed.method) if config is None else config.method_title
    folder = new_folder(fed.data.name, title) if out is None else Path(out)
    if (folder / "run.json").exists():
        raise StorageError(
            f"{folder} holds a run already", code="E402", where="out", remedy="another folder, or `lamina resume`"
        )
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        options = {
            "evaluate_every": evaluate_every,
            "checkpoint_every": checkpoint_every,
            "keep_clients_log": keep_clients_log,
        }
        book = Book(folder, _fresh_info(fed, rounds, options, config, title))
        with storing(folder):
            if config is not None:
                from lamina.config import to_toml

                replace(folder / "config.toml", to_toml(config).encode())
            replace(folder / "env.json", document(environment(fed)))
            replace(folder / "split.json", split_document(fed.data))
            for log in book.logs:
                (folder / log).write_bytes(b"")
            book.save()
        return _drive(fed, book, None, [], rounds, _watcher(progress))


def resume(
    path: str | Path, rounds: int | None = None, *, fed: Federation | None = None, progress: bool | Watcher = True
) -> Run:
    """Goes on with a run from its newest good checkpoint, as if it had never stopped.

    Args:
        rounds: in total; None: as many as it was to have.
        fed: for a run that was not made from a config.

    Raises:
        StorageError: E403 no run, E404 nothing whole to go on from, E405 another model or other data, E406 it is
            running now.
    """
    folder = Path(path)
    run = Run.open(folder, fed=fed)
    total = run.info["rounds"] if rounds is None else rounds
    done = run.info["rounds_done"]
    whole = isinstance(total, int) and total >= 1
    expect(whole, f"rounds={total!r}: expected a whole number >= 1", code="E103", where="rounds")
    if total < done or (total == done and run.info["status"] == "done"):
        expect(total == done, f"rounds={total}: this run has done {done}", code="E103", where="rounds")
        return run
    with locked(folder):
        fed = run._federation()
        recorded = json.loads((folder / "env.json").read_bytes())["data"]["fingerprint"]
        if fed.data.fingerprint != recorded:
            raise StorageError("the data is not what this run was started on", code="E405", where=str(folder))
        state, lengths, passed = restore(folder, fed, run.info["lengths"])
        info = run.info | {"rounds": total, "status": "running", "lengths": lengths, "error": None, "exit_code": None}
        info["rounds_done"] = state.round if state else 0
        records = [row_of(line) for line in read_log(folder / "metrics.jsonl", lengths["metrics.jsonl"])]
        again = Run(folder, info, records, fed, state)
        info |= {"best": result(again.best), "final": result(again.final)}
        book = Book(folder, info, again.best)
        with storing(folder):
            book.save()
            for log, length in lengths.items():
                os.truncate(folder / log, length)
            if (folder / "config.toml").is_file():
                text = (folder / "config.toml").read_text(encoding="utf-8")
                replace(folder / "config.toml", _with_rounds(text, total).encode())
        watcher = _watcher(progress)
        for damaged in passed:
            book.event({"event": "passed over", "code": "E404", "message": f"{damaged} is damaged"})
            watcher.note(f"E404  {damaged} is damaged: going on from the one before; the result stays the same")
        at = state.round if state else 0
        book.event({"event": "resumed", "round": at, "torch": torch.__version__})
        return _drive(fed, book, state, records, total - at, watcher)


def _with_rounds(text: str, total: int) -> str:
    """A written config with another number of rounds. A part may take `rounds` too: those stand below the head."""
    head, table, parts = text.partition("\n[")
    head = re.sub(rf"(?m)^rounds = (?!{total}\b)\d+( *)(?:#.*)?$", rf"rounds = {total}\1# lamina resume", head)
    return head + table + parts


def new_folder(experiment: str, method: str, root: str | Path | None = None) -> Path:
    """Makes runs/<experiment>/<NNN>-<method> with the next free number, and points runs/latest at it."""
    top = runs_root(root)
    parent = top / re.sub(r"[^A-Za-z0-9._-]+", "-", experiment).strip(".-")
    with storing(parent):
        parent.mkdir(parents=True, exist_ok=True)
        taken = [int(p.name[:3]) for p in parent.iterdir() if re.match(r"\d{3}-", p.name)]
        number = max(taken, default=0) + 1
        while True:
            folder = parent / f"{number:03d}-{method}"
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


def _drive(fed: Federation, book: Book, state: State | None, records: list[Row], rounds: int, watcher: Watcher) -> Run:
    run = Run(book.folder, book.info, records, fed, state)
    options = book.info["options"]
    every = options["checkpoint_every"]
    watcher.begin(run, fed)
    hold, total = fed.method.hold, book.info["rounds"]
    if total % hold:
        watcher.note(f"rounds={total} is no multiple of {hold}: the run may end with layers waiting")
    with _Interrupts() as interrupts:
        try:
            if rounds:
                going = fed.run(rounds, state, evaluate_every=options["evaluate_every"])
                with contextlib.closing(cast("Generator[tuple[State, RoundRecord]]", going)):
                    for state, record in going:
                        row = book.round(state, record, records[-1] if records else None)
                        records.append(row)
                        run._state = state
                        watcher.round(row)
                        for event in record.events:
                            watcher.note(_told(event, record))
                        last = state.round == total
                        if interrupts.asked or last or book.due(every, state.round):
                            book.commit(state)
                        if interrupts.asked and not last:
                            break
            interrupted = book.info["rounds_done"] < total
            book.finish(fed, run._state, "interrupted" if interrupted else "done", 130 if interrupted else 0)
        except KeyboardInterrupt:
            book.fail("interrupted", 130, "interrupted")
            raise
        except StorageError as error:
            book.fail("failed", error.exit_code, str(error))
            raise
        except LaminaError as error:
            book.last_words(run._state)
            book.fail("failed", error.exit_code, str(error))
            raise
        except Exception as error:
            book.last_words(run._state)
            with contextlib.suppress(OSError):
                (book.folder / "crash.txt").write_text(traceback.format_exc(), encoding="utf-8")
            book.fail("failed", 4, f"{type(error).__name__}: {error}")
            error.add_note(f"the run is {book.folder}, with this error in its crash.txt")
            raise
        finally:
            del records[book.info["rounds_done"] :]  # what is shown is what is committed
            watcher.end(run)
    if book.info["status"] == "interrupted":
        raise Interrupted(run)
    return run


def _told(event: Mapping[str, str], record: RoundRecord) -> str:
    return f"round {record.round}: client {event['client']}: {event['layer']} has {event['message']}  {event['code']}"


class _Interrupts:
    """Ctrl-C once is a wish, twice an order. Only in the main thread, where signals arrive."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> _Interrupts:
        self._mine = threading.current_thread() is threading.main_thread()
        if self._mine:
            self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._mine:
            signal.signal(signal.SIGINT, self._before)

    def _press(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
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
        "personal": fed.method.withholds == "personal",
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
        "torch": torch.__version__,
        "engine": fed.engine,
        "engine_reason": fed.engine_reason,
        "workers": fed.workers,
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


# ---- comparing


def compare(runs: Sequence[Run], *, force: bool = False) -> list[dict[str, Any]]:
    """A row per run: accuracy in rounds in sync, bytes, and how many times fewer than the first.

    A run on pooled data (centralised) may stand beside any on the same examples. `accuracy` is that of the clients' own
    models where `personal` says so.

    Raises:
        ConfigError: E109 when the runs are of different splits, unless `force`.
    """
    first = runs[0]
    split = next((run for run in runs if run.info["partition"] != POOLED), first)
    for run in () if force else runs:
        pooled = run.info["partition"] == POOLED
        key, what = ("pool_sha256", "other examples") if pooled else ("split_sha256", "another split")
        if run.info[key] != split.info[key]:
            raise ConfigError(
                f"{run.path.name} has {what} than {split.path.name}: accuracies are not comparable",
                code="E109",
                where=str(run.path),
                remedy="give them the same data.name, clients, partition and data.seed; or --force",
            )
    rows = []
    base = first.info["bytes_up"] + first.info["bytes_down"]
    for run in runs:
        info, final, best = run.info, run.final, run.best
        total = info["bytes_up"] + info["bytes_down"]
        codec = info["uplink"] if info["downlink"] == "fp32" else f"{info['uplink']} / {info['downlink']}"
        rows.append(
            {
                "run": str(run.path),
                "method": info["method"],
                "codec": codec,
                "status": info["status"],
                "rounds": info["rounds_done"],
                "accuracy": final and standing(final, run.personal),
                "loss": final and final.loss,
                "accuracy_round": final and final.round,
                "best": best and standing(best, run.personal),
                "best_round": best and best.round,
                "personal_accuracy": final and final.personal_accuracy,
                "personal": run.personal,
                "bytes_up": info["bytes_up"],
                "bytes_down": info["bytes_down"],
                "bytes_total": total,
                "vs_first": base / total if total else None,
                "up_vs_first": info["bytes_up"] / first.info["bytes_up"] if first.info["bytes_up"] else None,
                "seconds": info["seconds"],
                "partition": info["partition"],
                "split_sha256": info["split_sha256"],
                "pool_sha256": info["pool_sha256"],
                "initial_sha256": info["initial_sha256"],
                "final_sha256": info["final_sha256"],
                "torch": info["torch"],
            }
        )
    return rows
