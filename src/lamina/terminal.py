"""What people see: tables that never cut a number, and a run as it goes.

A table that does not fit drops whole columns, the least important first. Where the output is no terminal, nothing is
fitted and nothing moves: one plain line per round.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from lamina.redaction import printable

if TYPE_CHECKING:
    from lamina.federation import Federation
    from lamina.folder import Row
    from lamina.runs import Run

_UNITS = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3), ("B", 1))


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """rich would end the program here, in the middle of a run."""
        raise BrokenPipeError(errno.EPIPE, "nobody reads on")


def console(*, no_color: bool = False, stderr: bool = False) -> Console:
    """NO_COLOR and the width of the terminal are respected; numbers are not coloured by guessing."""
    return _Console(no_color=no_color or None, stderr=stderr, highlight=False, markup=False, emoji=False)


def unread(file: IO[str]) -> None:
    """Nobody reads this stream any more (`lamina ... | head`): what is still written to it goes nowhere."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a stream without a number is no pipe
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, file.fileno())
        os.close(nowhere)


def width_of(out: Console) -> int | None:
    """Columns to fit tables into; None where nobody looks at a terminal and nobody gave COLUMNS."""
    return out.width if out.is_terminal or "COLUMNS" in os.environ else None


# ---- numbers and tables


def size(n: int) -> str:
    """Bytes with four digits: ``"664.2 MB"`` (kB = 1000 B)."""
    return sizes([n])[0]


def sizes(values: Sequence[int]) -> list[str]:
    """Bytes in one unit, so that a column can be read from top to bottom."""
    unit, factor = next((u for u in _UNITS if max(values, default=0) >= u[1]), _UNITS[-1])
    if factor == 1:
        return [f"{n} B" for n in values]
    largest = max(values) / factor
    digits = 3 if largest < 10 else 2 if largest < 100 else 1
    return [f"{n / factor:.{digits}f} {unit}" for n in values]


def against(saving: float) -> str:
    """Bytes relative to FedAvg's, e.g. "-51.3 %"; "as much" reads 0.0, not -0.0."""
    return f"{round(-100 * saving, 1) + 0.0:+.1f} %"


def share(x: float | None) -> str:
    return "-" if x is None else f"{x:.4f}" if abs(x) < 1e5 else f"{x:.4g}"


def spread(mean: float | None, deviation: float | None) -> str:
    """ "0.7841 ± 0.0031"."""
    return share(mean) + ("" if mean is None or deviation is None else f" ± {share(deviation)}")


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Column(NamedTuple):
    title: str
    cells: Sequence[str]
    rank: int = 0  # the highest goes first when there is no room; 0 never goes
    left: bool = False


def table(columns: Sequence[Column], width: int | None) -> list[str]:
    """Lines: the titles, then the rows. At most `width` wide, if dropping columns of rank > 0 can do it."""
    shown = _fitting(columns, width)
    lines = []
    for cells in [[c.title for c in shown], *zip(*(c.cells for c in shown), strict=True)]:
        parts = [cell.ljust(_span(c)) if c.left else cell.rjust(_span(c)) for c, cell in zip(shown, cells, strict=True)]
        lines.append("  ".join(["", *parts]).rstrip())
    return lines


def _fitting(columns: Sequence[Column], width: int | None) -> list[Column]:
    """Those that `table` shows."""
    shown = list(columns)
    while width is not None and _wide(shown) > width and any(c.rank for c in shown):
        shown.remove(max(shown, key=lambda c: c.rank))
    return shown


def _span(column: Column) -> int:
    return max(len(text) for text in (column.title, *column.cells))


def _wide(columns: Sequence[Column]) -> int:
    return sum(_span(c) + 2 for c in columns)


def fields(pairs: Sequence[tuple[str, str]], width: int | None) -> list[str]:
    """``label  text`` lines, wrapped at the dots between facts, and between words where a fact is too long."""
    span = max(len(label) for label, _ in pairs) + 4
    lines: list[str] = []
    for label, text in pairs:
        facts = text.split(" · ")
        pieces = [f"{fact} ·" for fact in facts[:-1]] + facts[-1:]
        room = None if width is None else width - span
        if room is not None and max(map(len, pieces)) > room:
            pieces = text.split(" ")
        line = f"  {label}".ljust(span) + pieces[0]
        for piece in pieces[1:]:
            if width is not None and len(line) + 1 + len(piece) > width:
                lines.append(line)
                line = " " * span + piece
            else:
                line += f" {piece}"
        lines.append(line.rstrip())
    return lines


# ---- a run as tables


_CLIENTS_SHOWN = 20


def split_lines(split: dict[str, Any], width: int | None) -> list[str]:
    """The table of `lamina.folder.split_table`: a row per client, those in the middle left out where there are many."""
    clients, classes = split["clients"], split["classes"] or 0
    gap = len(clients) > _CLIENTS_SHOWN
    half = _CLIENTS_SHOWN // 2
    head, tail = (clients[:half], clients[-half:]) if gap else (clients, [])
    total = {
        "client": "all",
        "examples": sum(row["examples"] for row in clients),
        "labels": [sum(row["labels"][label] for row in clients) for label in range(classes)],
    }

    def column(title: str, of: Callable[[dict[str, Any]], str], rank: int = 0, left: bool = False) -> Column:
        middle = ["..."] if gap else []
        return Column(title, [*map(of, head), *middle, *map(of, tail), of(total)], rank, left)

    def count(label: int) -> Callable[[dict[str, Any]], str]:
        return lambda row: f"{row['labels'][label]:,}"

    def fitting(titles: Sequence[str]) -> list[Column]:
        who = column("client", lambda row: str(row["client"]), left=True)
        counts = [column(title, count(label), label + 1) for label, title in enumerate(titles)]
        return _fitting([who, column("examples", lambda row: f"{row['examples']:,}"), *counts], width)

    numbered = [f"label {label}" if label == 0 else str(label) for label in range(classes)]
    called = split.get("label_names") or []
    columns = fitting(called or numbered)
    narrowed = bool(called) and len(columns) - 2 < classes
    if narrowed:
        columns = fitting(numbered)
    shown = len(columns) - 2
    said = f"{split['data']} · {split['partition']} · {len(clients)} clients"
    if shown < classes:
        said += f" · labels {shown} to {classes - 1} do not fit; --json has them"
    facts = [("", said), ("sha256", split["split_sha256"])]
    if narrowed and shown:
        facts.insert(1, ("labels", " · ".join(f"{label} {name}" for label, name in enumerate(called[:shown]))))
    return [*table(columns, None), *fields(facts, width)]


_ROUNDS_SHOWN = 10


def _seconds(seconds: float) -> str:
    return clock(seconds) if seconds >= 60 else f"{seconds:.1f} s"


def summary(run: Run, width: int | None = 96) -> str:
    rows = run.records
    step = max(1, -(-len(rows) // _ROUNDS_SHOWN))
    shown = [row for row in rows if (row.round + 1) % step == 0 or row is rows[-1]]
    lines = []
    if shown:
        cells = [_cells(row, run.personal, _tested(run)) for row in shown]
        titles = enumerate(_titles(_tested(run)))
        lines = table([c._replace(cells=[line[i] for line in cells]) for i, c in titles], width)
    return "\n".join([*lines, *closing(run, width)])


def closing(run: Run, width: int | None) -> list[str]:
    """What a run came to."""
    from lamina.folder import standing

    info, final, best = run.info, run.final, run.best
    state = {"done": "done", "interrupted": "stopped", "failed": "failed", "running": "so far"}[info["status"]]
    said = [f"{info['rounds_done']} of {info['rounds']} rounds in {clock(info['seconds'])}"]
    if final is not None and best is not None and standing(final, run.personal) is not None:
        whose = "personal accuracy" if run.personal else "accuracy"
        waits = run.records[-1] if run.records and not run.records[-1].in_sync else None
        after = f" (the saved model is of round {waits.round}, where some layers wait)" if waits else ""
        said += [
            f"final {whose} {share(standing(final, run.personal))} @ {final.round}{after}",
            f"best {share(standing(best, run.personal))} @ {best.round}",
        ]
    elif final is not None:
        said.append(f"final loss {share(final.loss)} @ {final.round}")
    elif run.records and not _tested(run):
        last = run.records[-1]
        said += [f"train loss {share(last.train_loss)} @ {last.round}", "no test set: pass test= to ClientData"]
    if final is not None:
        said += _measured(final.metrics or {})
    if final is not None and final.personal_accuracy is not None and not run.personal:
        said.append(f"personal {share(final.personal_accuracy)}")
    pairs = [(state, " · ".join(said))]
    if run.records:
        last = run.records[-1]
        percent = f"{100 * abs(last.saving):.1f} %"
        against = f"{percent} {'less' if last.saving > 0 else 'more'} than FedAvg fp32"
        if percent == "0.0 %":
            against = "as much as FedAvg fp32"
        pairs.append(("bytes", f"up {info['bytes_up']:,} · down {info['bytes_down']:,} · {against}"))
        if last.network_seconds is not None:
            pairs.append(("network", f"{_seconds(last.network_seconds)} on the links of network.*"))
        if info.get("privacy"):
            pairs.append(("privacy", _epsilon(last, info["privacy"])))
        if info.get("stopped"):
            pairs.append(("stopped", info["stopped"]))
        refused = sum(row.refused for row in run.records)
        if refused:
            pairs.append(("faults", f"{refused} updates not used: events.jsonl"))
    return fields([*pairs, ("saved", str(run.path))], width)


def _epsilon(last: Row, privacy: Mapping[str, Any]) -> str:
    """What the models of a run have cost, and as long as what."""
    if last.epsilon is None:
        return "no epsilon: some of the rounds were made without privacy"
    held = "the seed stays secret" if privacy["noise_seed"] == "run" else "only models are published"
    return f"epsilon {last.epsilon:.4g} at delta {privacy['delta']:g}, for the models, as long as {held}"


def _measured(metrics: Mapping[str, float | None]) -> list[str]:
    """Metrics in words; one with a value per label by its least and its greatest."""
    families: dict[str, dict[str, float | None]] = {}
    for name, value in metrics.items():
        families.setdefault(name.rpartition("/")[0] or name, {})[name] = value
    said = []
    for family, values in families.items():
        known = {name: value for name, value in values.items() if value is not None}
        if len(values) == 1 or not known:
            said += [f"{name} {share(known[name]) if known else 'undefined'}" for name in (*values,)[:1]]
        else:
            ends = (min(known, key=known.__getitem__), max(known, key=known.__getitem__))
            low, high = (f"{share(known[name])} ({name.rpartition('/')[2]})" for name in ends)
            missing = f", {len(values) - len(known)} undefined" if len(known) < len(values) else ""
            said.append(f"{family} {low} to {high}{missing}")
    return said


# ---- a run as it goes

_ROUND = [
    Column("round", ["00000"]),
    Column("acc", ["0.0000"]),
    Column("loss", ["00.0000"], 3),
    Column("sync", ["wait"], 2, left=True),
    Column("layers", ["000/000"], 4),
    Column("clients", ["00/00"], 6),
    Column("total up", ["0000.0 MB"]),
    Column("total down", ["0000.0 MB"]),
    Column("vs FedAvg", ["-00.0 %"], 1),
    Column("s/round", ["000.00"], 5),
]


def _tested(run: Run) -> bool:
    """Whether there is a test set; else the loss of the training stands in the table."""
    return bool(run.info.get("tested", True))


def _titles(tested: bool) -> list[Column]:
    return [c._replace(title="train loss") if c.title == "loss" and not tested else c for c in _ROUND]


def _cells(row: Row, personal: bool, tested: bool = True) -> list[str]:
    from lamina.folder import standing

    return [
        str(row.round),
        share(standing(row, personal)),
        share(row.loss if tested else row.train_loss),
        "sync" if row.in_sync else "wait",
        f"{row.uploaded}/{row.parameters}",
        f"{row.clients - row.refused}/{row.clients}",
        size(row.total_up),
        size(row.total_down),
        against(row.saving),
        f"{row.seconds:.2f}",
    ]


def banner(run: Run, fed: Federation, width: int | None) -> list[str]:
    import torch

    info, local = run.info, fed.local
    span = fed.data.sizes
    work = f"{local.steps} steps" if local.steps else f"{local.epochs} epoch{'s' * (local.epochs > 1)}"
    batch = "all" if local.batch_size is None else local.batch_size
    sgd = f"SGD {local.lr:g}" + (f" momentum {local.momentum:g}" if local.momentum else "")
    sgd += f" {local.precision}" * (local.precision != "fp32")
    config = f"   config {info['config_sha256'][:8]}" if info["config_sha256"] else ""
    workers = f" x{info['workers']}" if info["engine"] in ("processes", "cuda") else ""
    most = sum(x.numel() * x.element_size() for x in fed.initial.params.values())
    engine = f"{info['engine']}{workers} · {info['engine_reason']}"
    pairs = [
        ("run", f"{run.path}{config}"),
        ("data", f"{info['data']} · {info['clients']} clients · {fed.data.partition} · "
                 f"{int(span.min()):,}-{int(span.max()):,} examples (median {int(span.median()):,})"),
        ("model", f"{info['parameters']:,} parameters · {size(most)} · {len(fed.layers)} tensors"),
        ("method", f"{info['method_repr']} · cohort {info['cohort']} · {work}, batches of {batch} · {sgd}"),
        ("wire", f"up {info['uplink']} · down {info['downlink']}"),
        ("engine", f"{engine} · torch {torch.__version__} · seed {info['seed']}"),
    ]  # fmt: skip
    if info.get("privacy"):
        said = info["privacy"]
        drawn = f"every client is drawn with probability {said['sampling']:g}"
        pairs.append(("privacy", f"clip {said['clip']:g} · noise {said['noise']:g} · {drawn} · no diagnostics"))
    if info.get("secure"):
        said = info["secure"]
        sums = f"sums of {said['bits']} bits · threshold {said['threshold']:g} · limit {said['limit']:g}"
        pairs.append(("secure", sums))
    return fields(pairs, width)


class Terminal:
    """Rows above, a bar with the running totals and the time left below; plain lines where there is no terminal.

    Args:
        out: where to.
        log_every: rounds between two lines; None: every one on plain output, about twenty in all on a terminal.
    """

    def __init__(self, out: Console | None = None, log_every: int | None = None):
        self.out = out or console()
        self.width = width_of(self.out)
        self._every = log_every
        self._live: Progress | None = None

    def begin(self, run: Run, fed: Federation) -> None:
        self._total = run.info["rounds"]
        self._done = run.info["rounds_done"]
        self._began = time.monotonic()
        self._first = self._done
        plain = not self.out.is_terminal
        self._step = self._every or (1 if plain else max(1, self._total // 20))
        self._say(banner(run, fed, self.width))
        self._tested = _tested(run)
        self._shown = _titles(self._tested)
        fitted = list(self._shown)
        while self.width is not None and _wide(fitted) > self.width and any(c.rank for c in fitted):
            fitted.remove(max(fitted, key=lambda c: c.rank))
        self._columns = [i for i, c in enumerate(self._shown) if c in fitted]
        self._personal = run.personal
        self._titled = False  # the titles wait for the first line: notes at the start come before them
        if not plain:
            bar = BarColumn(bar_width=20)
            text = TextColumn("{task.description}", markup=False)
            self._live = Progress(text, bar, TextColumn("{task.fields[said]}", markup=False), console=self.out)
            self._task = self._live.add_task(self._count(), total=self._total, completed=self._done, said="")
            self._live.start()

    def round(self, row: Row) -> None:
        self._done = row.round + 1
        if self._done % self._step == 0 or self._done == self._total:
            cells = _cells(row, self._personal, self._tested)
            titles = [] if self._titled else ["", self._line([c.title for c in self._shown])]
            self._titled = True
            self._say([*titles, self._line(cells)])
        if self._live is not None:
            left = (time.monotonic() - self._began) / (self._done - self._first) * (self._total - self._done)
            pieces = [f"eta {clock(left)}", f"acc {_cells(row, self._personal)[1]}", f"total up {size(row.total_up)}",
                      f"down {size(row.total_down)}", against(row.saving)]  # fmt: skip
            room = self.out.width - len(self._count()) - 20 - 3
            while len("  ".join(pieces)) > room and len(pieces) > 1:
                pieces.pop()
            self._live.update(self._task, completed=self._done, description=self._count(), said="  ".join(pieces))

    def note(self, text: str) -> None:
        self._say([f"! {text}"])

    def end(self, run: Run) -> None:
        if self._live is not None:
            with contextlib.suppress(OSError):
                self._live.stop()
            self._live = None
        self._say(["", *closing(run, self.width), ""])

    def _count(self) -> str:
        return f"  round {self._done}/{self._total}"

    def _line(self, cells: Sequence[str]) -> str:
        parts = []
        for i in self._columns:
            span = _span(self._shown[i])
            parts.append(cells[i].ljust(span) if self._shown[i].left else cells[i].rjust(span))
        return "  ".join(["", *parts]).rstrip()

    def _say(self, lines: Sequence[str]) -> None:
        """Where nobody reads on (`| head`, a terminal that was closed), the run goes on unseen."""
        try:
            for line in lines:
                self.out.print(Text(printable(line)), soft_wrap=True)
            self.out.file.flush()
        except OSError:
            self.out.quiet = True
            unread(self.out.file)


class Quiet:
    """Only what went wrong, on the error output."""

    def begin(self, run: Run, fed: Federation) -> None: ...

    def round(self, row: Row) -> None: ...

    def note(self, text: str) -> None:
        print(f"! {printable(text)}", file=sys.stderr, flush=True)

    def end(self, run: Run) -> None: ...


class Objects:
    """One JSON object per line: "begin", "round" (a row of metrics.jsonl), "note", "end" (run.json)."""

    def begin(self, run: Run, fed: Federation) -> None:
        self._emit({"event": "begin", "run": str(run.path), **run.info})

    def round(self, row: Row) -> None:
        self._emit({"event": "round", **row._asdict()})

    def note(self, text: str) -> None:
        self._emit({"event": "note", "text": text})

    def end(self, run: Run) -> None:
        self._emit({"event": "end", "run": str(run.path), **run.info})

    def _emit(self, value: dict[str, Any]) -> None:
        try:
            emit(value)
        except OSError:
            unread(sys.stdout)


def emit(value: dict[str, Any]) -> None:
    """One line of JSON, which holds nothing that a terminal obeys."""
    from lamina.folder import finite

    text = json.dumps(finite(value), ensure_ascii=False)  # it escapes what is below a space
    print(re.sub("[\x7f-\x9f]", lambda c: f"\\u{ord(c[0]):04x}", text), flush=True)


# ---- data on its way


class Fetching:
    """Shows how far a data set has come; usable as the `progress` of `lamina.data`."""

    def __init__(self, out: Console, objects: bool = False):
        self.out = out
        self.objects = objects
        self._bars: Progress | None = None
        self._stage: tuple[str, str] | None = None

    def __enter__(self) -> Callable[[str, str, int, int], None]:
        return self._report

    def __exit__(self, *exception: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def _report(self, name: str, stage: str, done: int, total: int) -> None:
        new = (name, stage) != self._stage
        self._stage = (name, stage)
        if self.objects:
            if new:
                emit({"event": "fetch", "data": name, "stage": stage, "total": total})
        elif not self.out.is_terminal:
            if new:
                self.out.print(Text(f"  {name}: {stage}" + (f" {size(total)}" if total else "")), soft_wrap=True)
        else:
            if self._bars is None:
                said = TextColumn("{task.fields[said]}", markup=False)
                self._bars = Progress(
                    TextColumn("{task.description}", markup=False), BarColumn(20), said, console=self.out
                )
                self._bars.start()
            if new:
                for task in self._bars.task_ids:
                    self._bars.remove_task(task)
                self._bars.add_task(f"  {name}: {stage}", total=total or None, said="")
            said_now = f"{size(done)} of {size(total)}" if total else ""
            self._bars.update(self._bars.task_ids[-1], completed=done, total=total or None, said=said_now)
