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
import shutil
import signal
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
from lamina.data.client_data import POOLED
from lamina.engine import bits, cores, mkl, processes
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
    read_environment,
    read_info,
    read_rows,
    replace,
    restore,
    result,
    rewrite,
    split_document,
    standing,
    storing,
)
from lamina.machine import content, environment
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

    def _federation(self) -> Federation:
        if self._fed is None:
            from lamina.config import build

            self._fed = build(self._config())
        return self._fed

    def _config(self) -> Config:
        """config.toml, with an engine that gives the bits of the one that the run began with."""
        if not (self.path / "config.toml").is_file():
            raise StorageError(
                f"{self.path} was not made from a config, so its model cannot be rebuilt",
                code="E405",
                remedy="give the federation: lamina.runs.resume(path, fed=fed); to look at it, Run.open(path, fed=fed)",
            )
        from lamina.config import load

        config = load(self.path / "config.toml", env={})
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
        checkpoint_every: rounds between two commits; "auto": as often as costs a twentieth of the time. The last
            round, and the one that Ctrl-C or an error ends, are committed in any case. None: as the config says,
            without one "auto".
        keep_clients_log: write clients.jsonl, the bytes of every client in every round; None: as the config says,
            without one no.
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
        }
        book = Book(folder, _fresh_info(fed, rounds, options, config, title))
        with storing(folder):
            if config is not None:
                from lamina.config import to_toml

                replace(folder / "config.toml", to_toml(config).encode())
            began = {} if config is None else {"config": config.fixed, "entries": config.entry_sha256}
            replace(folder / "env.json", document(environment(fed) | began))
            rewrite(folder / "split.json", split_document(fed.data))
            for log in book.logs:
                (folder / log).write_bytes(b"")
            book.save()
        return _drive(fed, book, Run(folder, book.info, [], fed, None), rounds, _watcher(progress))


def resume(
    path: str | Path, rounds: int | None = None, *, fed: Federation | None = None, progress: bool | Watcher = True
) -> Run:
    """Goes on with a run from its newest good checkpoint, as if it had never stopped.

    Args:
        rounds: in total; None: as many as it was to have.
        fed: for a run that was not made from a config.

    Raises:
        StorageError: E403 no run, E404 nothing whole to go on from, E405 another config, model, engine or other data,
            E406 it is running now.
    """
    folder = Path(path)
    run = Run(folder, read_info(folder), [], fed, None)
    total = run.info["rounds"] if rounds is None else rounds
    done = run.info["rounds_done"]
    whole = isinstance(total, int) and total >= 1
    expect(whole, f"rounds={total!r}: expected a whole number >= 1", code="E103", where="rounds")
    if total < done or (total == done and run.info["status"] == "done"):
        expect(total == done, f"rounds={total}: this run has done {done}", code="E103", where="rounds")
        return Run.open(folder, fed=fed)
    with locked(folder):
        config = None if fed is not None else run._config()
        fed, warning = _as_it_began(run, config, total)
        state, lengths, passed = restore(folder, fed, run.info["lengths"])
        info = run.info | {"rounds": total, "status": "running", "lengths": lengths, "error": None, "exit_code": None}
        info |= {"rounds_done": state.round if state else 0, "final_sha256": None}
        info |= {"engine": fed.engine, "workers": fed.workers, "cores": cores()}
        info |= {"bytes_up": state.bytes_up if state else 0, "bytes_down": state.bytes_down if state else 0}
        info["engine_reason"] = run.info.get("engine_reason") if fed.engine == run.info["engine"] else "same bits"
        if config is not None:
            info["config_sha256"] = config.model_copy(update={"rounds": total}).sha256
        records = read_rows(folder, lengths["metrics.jsonl"])
        again = Run(folder, info, records, fed, state)
        del state  # `again` takes the next ones in its place, so that its rows can go
        info |= {"best": result(again.best), "final": result(again.final)}
        book = Book(folder, info, again.best)
        fed.store.shelf.claim()
        with storing(folder):
            book.save()
            (folder / "model.safetensors").unlink(missing_ok=True)  # until the end, the newest checkpoint is the model
            for log, length in lengths.items():
                os.truncate(folder / log, length)
            if (folder / "config.toml").is_file():
                text = (folder / "config.toml").read_text(encoding="utf-8")
                replace(folder / "config.toml", _with_rounds(text, total).encode())
        watcher = _watcher(progress)
        for damaged in passed:
            book.event({"event": "passed over", "code": "E404", "message": f"{damaged} is damaged"})
            watcher.note(f"E404  {damaged} is damaged: going on from the one before; the result stays the same")
        if warning:
            book.event({"event": "other cores", "message": warning})
            watcher.note(warning)
        at = info["rounds_done"]
        book.event({"event": "resumed", "round": at, "torch": mkl.label()})
        return _drive(fed, book, again, total - at, watcher)


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

    recorded = read_environment(folder)
    if config is not None and "config" in recorded:
        before, after = recorded["config"], json.loads(json.dumps(config.fixed))
        other = [key for key in {**before, **after} if before.get(key, ...) != after.get(key, ...)]
        if other:
            raise refuse(
                f"config.toml is not what this run was started with: {', '.join(other)}",
                "put it back, or start another run: lamina run config.toml",
            )
        for key, sha256 in config.entry_sha256.items():
            if recorded.get("entries", {}).get(key) != sha256:
                raise refuse(f"{config.fixed[key].rpartition(':')[0]} ({key}) has changed since this run began")
    fed = run._federation() if config is None else _built(run, config)
    data, held = recorded["data"], content(fed.data)
    if fed.data.fingerprint != data["fingerprint"] or data.get("content", held) != held:
        raise refuse("the data is not what this run was started on")
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
        if empty and not (folder / "run.json").exists():
            link = folder.parent.parent / "latest"
            with contextlib.suppress(OSError):
                if link.is_symlink() and link.resolve() == folder.resolve():
                    link.unlink()
            shutil.rmtree(folder, ignore_errors=True)
        raise


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


def _drive(fed: Federation, book: Book, run: Run, rounds: int, watcher: Watcher) -> Run:
    records = run.records
    options = book.info["options"]
    every = options["checkpoint_every"]
    watcher.begin(run, fed)
    hold, total = fed.method.hold, book.info["rounds"]
    if fed.method.compensates and fed.uplink.lossless:
        title, codec = method_title(fed.method), codec_title(fed.uplink)
        watcher.note(f"{title} sends later what the uplink loses, and {codec} loses nothing: try uplink=topk:0.02")
    if total % hold:
        watcher.note(f"rounds={total} is no multiple of {hold}: the run may end with layers waiting")
    with _Interrupts() as interrupts:
        try:
            if rounds:
                going = fed.run(rounds, run._state, evaluate_every=options["evaluate_every"])
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
            code = interrupts.exit_code if interrupted else 0
            book.finish(fed, run._state, "interrupted" if interrupted else "done", code)
        except KeyboardInterrupt:
            book.fail("interrupted", interrupts.exit_code, "interrupted")
            raise
        except StorageError as error:
            book.fail("failed", error.exit_code, str(error))
            raise
        except LaminaError as error:
            book.last_words(run._state)
            if interrupts.asked and error.code == "E303":  # the signal went to the worker processes too
                book.fail("interrupted", interrupts.exit_code, "interrupted")
                raise Interrupted(run) from error
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
    what = f"{event['layer']} has {event['message']}" if "layer" in event else f"{event['why']}: {event['message']}"
    return f"round {record.round}: client {event['client']}: {what}  {event['code']}"


class _Interrupts:
    """Ctrl-C once is a wish, twice an order; SIGTERM and SIGHUP, where nobody else handles or ignores them, are a wish
    too. Only in the main thread, where signals arrive."""

    def __init__(self) -> None:
        self.asked = False
        self.exit_code = 130

    def __enter__(self) -> _Interrupts:
        self._process = os.getpid()
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)
                if number is not None and (name == "SIGINT" or signal.getsignal(number) == signal.SIG_DFL):
                    self._before[number] = signal.signal(number, self._press)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _press(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a worker process: it ends with its parent
        self.exit_code = 128 + number
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
        moved = not pooled and run.info["split_sha256"] != split.info["split_sha256"]
        what = "another split" if moved else "other examples"
        if moved or run.info["pool_sha256"] != split.info["pool_sha256"]:
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
                "engine": info["engine"],
                "bits": f"threads on {info.get('cores')} cores"
                if info["engine"] == "threads"
                else bits(info["engine"]),
            }
        )
    return rows
