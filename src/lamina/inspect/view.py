"""An inspection and a forecast as lines of text."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from lamina.inspect.budget import Budget
from lamina.inspect.checks import Finding, named
from lamina.inspect.forecasts import Forecast, Range
from lamina.inspect.inspection import Inspection
from lamina.inspect.table import Row
from lamina.terminal import Column, clock, fields, size, sizes, table

_BLOCK = 0.05  # share of the bytes that one block of a bar stands for
_WIDE = 96  # columns where nobody says how many there are
_POLICIES = {
    "average": "weighted mean of the cohort's; integers take the maximum",
    "keep": "each client keeps its own",
    "skip": "every round starts from the initial ones",
}


def lines(made: Inspection, width: int | None, every: bool = False) -> list[str]:
    """Args: every: a row per tensor instead of per stage."""
    said: list[str] = []
    others = made.rest
    head = [made.title, f"{made.params:,} parameters", f"{made.bytes:,} B {' '.join(made.dtypes)}".rstrip()]
    if others.norms:
        counters = sum(name.endswith("num_batches_tracked") for name in others.counters)
        held = f"{others.statistics:,} floats + {_many(counters, 'counter')}"
        head.append(f"{_many(others.norms, 'norm')} with statistics ({held})")
    said += fields([("model", " · ".join(head))], width)
    said += ["", *table(_columns(made.tensors if every else made.stages, every), width), ""]
    said += fields(_others(made), width) if _others(made) else []
    for finding in made.findings:
        said += ["", *_finding(finding, width)]
    if made.fine:
        said += ["", *fields([("ok", " · ".join(made.fine))], width)]
    said += [""]
    if made.budget is not None:
        said += _budgeted(made.budget, width)
    elif made.skipped:
        said += fields([("I300", f"no forecast: {made.skipped}")], width)
    return said


def _columns(rows: Sequence[Row], every: bool) -> list[Column]:
    def cells(of: Any) -> list[str]:
        return ["-" if (value := of(row)) is None else value for row in rows]

    frozen = any(row.frozen for row in rows)
    columns = [
        Column("tensor" if every else "group", cells(lambda r: r.group), left=True),
        Column("shape" if every else "kind", cells(lambda r: r.kind), 3, left=True),
    ]
    if not every:
        columns.append(Column("out", cells(lambda r: r.out), 4, left=True))
    columns += [
        Column("width", cells(lambda r: None if r.width is None else f"{r.width:,}"), 5),
        Column("RF", cells(lambda r: None if r.field is None else f"{r.field:,}"), 2),
        Column("params", cells(lambda r: f"{r.params:,}")),
        Column("bytes", cells(lambda r: f"{r.bytes:,}"), 1),
        Column("share", cells(lambda r: f"{100 * r.share:.1f} %")),
    ]
    if frozen:
        columns.append(Column("frozen", cells(lambda r: f"{r.frozen:,}"), 1))
    return [*columns, Column("", cells(lambda r: _bar(r.share)), 6, left=True)]


def _bar(share: float) -> str:
    return "█" * round(share / _BLOCK) or ("▏" if share else "")


def _others(made: Inspection) -> list[tuple[str, str]]:
    """What is no trainable parameter, and what happens to it."""
    others, pairs = made.rest, []
    sizes = [f"{n:,} floats of {_many(others.norms, 'norm')}" for n in [others.statistics] if n]
    sizes += [f"{sum(others.floats.values()):,} floats in {named([*others.floats])}"] if others.floats else []
    sizes += [f"{len(others.counters)} of integers or bools"] if others.counters else []
    if sizes:
        pairs.append(("buffers", f"{', '.join(sizes)} · buffers={made.policy}: {_POLICIES[made.policy]}"))
    if others.unsaved:
        pairs.append(("caches", f"{named(others.unsaved)} · in no state_dict: stay where they are, never sent"))
    for name, first, _ in others.tied:
        pairs.append(("tied", f"{name} is {first} · sent once, under the latter's name"))
    if others.frozen:
        names = named([*others.frozen])
        pairs.append(("frozen", f"{sum(others.frozen.values()):,} in {names} · never sent, never changed"))
    return pairs


def _many(n: int, word: str) -> str:
    return f"{n:,} {word}{'s' * (n != 1)}"


def _finding(finding: Finding, width: int | None) -> list[str]:
    room = (width or _WIDE) - 8
    told = [*_wrapped(finding.figure, room), *_wrapped(finding.reason, room)]
    fix = _wrapped(f"fix: {finding.remedy}", room)
    explain = f"lamina explain {finding.code}"
    if len(fix[-1]) + 2 + len(explain) <= room:
        fix[-1] = fix[-1].ljust(room - len(explain)) + explain
    else:
        fix.append(explain)
    return [("  " + finding.code if i == 0 else "").ljust(8) + text for i, text in enumerate([*told, *fix])]


def _wrapped(text: str, room: int) -> list[str]:
    """Broken between words, a number never from its unit."""
    joined = re.sub(r"(\d) (%|B|kB|MB|GB|s|ms)(?!\w)", "\\1\u00a0\\2", text)
    texts = textwrap.wrap(joined, room, break_long_words=False, break_on_hyphens=False)
    return [line.replace("\u00a0", " ") for line in texts] or [""]


def _budgeted(made: Budget, width: int | None) -> list[str]:
    methods = list(dict.fromkeys(cell.method for cell in made.cells))
    codecs = list(dict.fromkeys(cell.codec for cell in made.cells))
    cell = {(c.method, c.codec): c for c in made.cells}
    down = list(dict.fromkeys((c.downlink, c.codec) for c in made.cells if c.codec in ("fp32", "lossless")))
    columns = [Column("method", methods, left=True)]
    values = sizes([round(c.up) for c in made.cells] + [round(c.down) for c in made.cells])
    texts = dict(zip(cell, values[: len(made.cells)], strict=True))
    downs = dict(zip(cell, values[len(made.cells) :], strict=True))
    ranks = {"fp32": 0, "lossless": 2, "topk:0.01": 3, "int8": 4, "fp16": 5}
    for codec in codecs:
        column = [("" if cell[m, codec].exact else "~") + texts[m, codec] for m in methods]
        columns.append(Column(f"up {codec}", column, ranks.get(codec, 6)))
    for name, codec in down:
        columns.append(Column(f"down {name}", [downs[m, codec] for m in methods], 1 if name == "fp32" else 7))
    said = fields([("I300", f"bytes of one client in one round · mean of {made.rounds} rounds · "
                            "from one real round of two clients · ~ depends on values")], width)  # fmt: skip
    said += ["", *table(columns, width)]
    for method, why in made.left_out.items():
        said += [f"  {method}: not here: {line}" if i == 0 else f"    {line}"
                 for i, line in enumerate(_wrapped(why, (width or _WIDE) - 20 - len(method)))]  # fmt: skip
    plain = cell.get(("fedavg", "fp32"))
    pairs = [("I320", f"{_short(made.seconds_per_step)} per local step on one core here")]
    if plain is not None:
        n = made.rounds * made.cohort
        cost = f"up {size(round(n * plain.up))}, down {size(round(n * plain.down))}"
        whose = f"{made.rounds} rounds x {made.cohort} clients"
        whose = whose if made.chosen else f"for example {whose} (of an experiment: `lamina inspect exp.toml`)"
        pairs.insert(0, ("cost", f"{whose}, FedAvg fp32: {cost}"))
    return [*said, "", *fields(pairs, width)]


def _short(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


# ---- a dry run


def dry_run(made: Forecast, clients: int, width: int | None) -> list[str]:
    trained, samples = made.sampled
    times = "one real round" if samples == 1 else f"{samples} real rounds"
    step = f"{times} with {trained} of {clients:,} clients: ok, {made.sampling_seconds:.1f} s"
    pairs = [("step", step), ("forecast", " · ".join(_forecast(made)))]
    if made.why:
        pairs.append(("range", made.why))
    if made.counted < made.rounds:
        pairs.append(("counted", f"{made.counted} of {made.rounds} rounds; the others are taken to be like the last"))
    fedavg = f"up {size(made.fedavg_up)} · down {size(made.fedavg_down)}"
    pairs.append(("FedAvg", f"{fedavg} with fp32, every tensor in every round"))
    return [*fields(pairs, width), "  nothing was written"]


def _forecast(made: Forecast) -> Iterator[str]:
    yield f"up {ranged(made.up)}"
    yield f"down {ranged(made.down, 'at most')}"  # a tensor that a round did not change is not sent again
    yield f"about {clock(made.seconds)} ({_short(made.seconds / made.rounds)} a round)"
    if made.memory is not None:
        yield f"peak memory {size(made.memory)}"


def ranged(span: Range, known: str = "exactly") -> str:
    """ "78.4-88.1 MB", or every digit where the number is known, and how well it is."""
    if span.exact:
        return f"{span.low:,} B {known}"
    low, high = sizes([span.low, span.high])
    return f"{low.split()[0]}-{high}"
