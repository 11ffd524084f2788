"""The rows of `lamina.compare` as tables: for a terminal, in Markdown, LaTeX and CSV."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lamina.data.client_data import POOLED
from lamina.tabular import commas, latex, markdown
from lamina.terminal import Column, clock, fields, share, sizes, spread, table

_SAME = (("torch", "torch"), ("engine", "bits"))


def as_text(rows: Sequence[dict[str, Any]], width: int | None) -> list[str]:
    return [*table(_columns(rows), width), *fields([("", " · ".join(_common(rows)))], width)]


def as_markdown(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [*markdown(_columns(rows)), "", " · ".join(_common(rows))]


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    return commas(rows, list(rows[0]))


def as_latex(rows: Sequence[dict[str, Any]]) -> list[str]:
    """For a paper: bytes in one unit, the best of every column bold."""
    accuracy = _accuracy(rows)
    figures = ["bytes_up", "bytes_down", "bytes_total", *(["to_target"] if _targeted(rows) else [])]
    unit, texts = _in_one_unit([[row[of] for row in rows] for of in figures])
    titles = ["up", "down", "total", *([f"to {rows[0]['target']:g}"] if _targeted(rows) else [])]
    number = "accuracy" if accuracy else "loss"
    columns = [Column("method", [row["method"] for row in rows], left=True)]
    if len({row["codec"] for row in rows}) > 1:
        columns.append(Column("codec", [row["codec"] for row in rows], left=True))
    if any(row["settings"] for row in rows):
        columns.append(Column("settings", _settings_cells(rows), left=True))
    if len({row["n"] for row in rows}) > 1:
        columns.append(Column("seeds", [str(row["n"]) for row in rows]))
    if _targeted(rows):
        texts[-1] = [_unreached(row) if row["to_target"] is None else x for row, x in zip(rows, texts[-1], strict=True)]
    ranked = {len(columns): [row[number] if not accuracy or row[number] is None else -row[number] for row in rows]}
    columns.append(Column(number, [spread(row[number], row[f"{number}_deviation"]) for row in rows]))
    for of, title, cells in zip(figures, titles, texts, strict=True):
        ranked[len(columns)] = [row[of] for row in rows]
        columns.append(Column(f"{title} ({unit})", cells))
    bold = {
        (i, at)
        for i, values in ranked.items()
        if len(rows) > 1
        for at, cell in enumerate(columns[i].cells)
        if cell == columns[i].cells[_best(values)] and values[at] is not None
    }
    return latex(columns, bold, _common(rows))


def _best(values: Sequence[float | None]) -> int:
    return min(range(len(values)), key=lambda i: math.inf if (value := values[i]) is None else value)


def _in_one_unit(columns: Sequence[Sequence[float | None]]) -> tuple[str, list[list[str]]]:
    """A unit for all, by the largest, and as many decimals as leave the smallest two digits (six at most)."""
    known = [x for values in columns for x in values if x]
    unit = sizes([round(max(known, default=0))])[0].split()[1]
    factor = {"GB": 10**9, "MB": 10**6, "kB": 10**3, "B": 1}[unit]
    digits = 0 if factor == 1 else min(6, max(2, 2 - math.ceil(math.log10(min(known) / factor))))
    return unit, [["-" if x is None else f"{x / factor:.{digits}f}" for x in values] for values in columns]


def _accuracy(rows: Sequence[dict[str, Any]]) -> bool:
    return any(row["accuracy"] is not None for row in rows)


def _targeted(rows: Sequence[dict[str, Any]]) -> bool:
    return rows[0]["target"] is not None and _accuracy(rows)


def _settings_cells(rows: Sequence[dict[str, Any]]) -> list[str]:
    """ "phi=4 lr=0.1": keys by their last word, where no two of the table share it."""
    keys = {key for row in rows for key in row["settings"]}
    last = Counter(key.rsplit(".", 1)[-1] for key in keys)

    def short(key: str) -> str:
        word = key.rsplit(".", 1)[-1]
        return word if last[word] == 1 else key

    def said(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    return [" ".join(f"{short(key)}={said(value)}" for key, value in row["settings"].items()) or "-" for row in rows]


def _short_names(rows: Sequence[dict[str, Any]]) -> tuple[list[str], bool]:
    """What to call the runs, and whether that is their number."""
    folders = [row["run"].rstrip("/").replace("\\", "/").split("/") for row in rows]
    plain = len({parts[-2:-1] and parts[-2] for parts in folders}) == 1
    names = [parts[-1].split("-")[0] if plain else "/".join(parts[-2:]) for parts in folders]
    return ([row["run"] for row in rows] if len(set(names)) < len(names) else names), plain


def _columns(rows: Sequence[dict[str, Any]]) -> list[Column]:
    names, plain = _short_names(rows)
    accuracy = _accuracy(rows)
    number = "accuracy" if accuracy else "loss"
    seeds = any(row["n"] > 1 for row in rows)
    at = [row["accuracy_round"] if row[number] is not None else None for row in rows]

    def bytes_of(of: str) -> list[str]:
        known = iter(sizes([round(row[of]) for row in rows if row[of] is not None]))
        return [_unreached(row) if row[of] is None else next(known) for row in rows]

    columns = [
        Column("run", names, left=True),
        Column("method", [row["method"] for row in rows], left=True),
        Column("codec", [row["codec"] for row in rows], 5, left=True),
        Column("settings", _settings_cells(rows), 1, left=True) if any(row["settings"] for row in rows) else None,
        Column("rounds", [f"{row['rounds']:g}" for row in rows], 8) if len(_lengths(rows)) > 1 else None,
        Column("seeds", [str(row["n"]) for row in rows], 4) if seeds else None,
        Column("acc" if accuracy else "loss", [spread(row[number], row[f"{number}_deviation"]) for row in rows]),
        Column("@round", ["-" if x is None else str(x) for x in at], 12),
        Column("best", [share(row["best"]) for row in rows], 7),
        Column("personal", [share(row["personal_accuracy"]) for row in rows], 9) if _both(rows) else None,
        Column(f"to {rows[0]['target']:g}", bytes_of("to_target"), 6) if _targeted(rows) else None,
        Column("up", bytes_of("bytes_up")),
        Column("down", bytes_of("bytes_down"), 6),
        Column("total", bytes_of("bytes_total"), 3),
        Column("up vs first", [_percent(row["up_vs_first"]) for row in rows], 8),
        Column(f"vs {names[0]}" if plain else "vs first", [_times(row["vs_first"]) for row in rows], 2),
        Column("time", [clock(row["seconds"]) for row in rows], 11),
        Column("status", [row["status"] for row in rows], 10, left=True) if _unfinished(rows) else None,
    ]
    return [column for column in columns if column is not None]


def _percent(x: float | None) -> str:
    return "-" if x is None else f"{100 * x:.1f} %"


def _times(x: float | None) -> str:
    return "-" if x is None else f"{x:.2f}x"


def _unreached(row: dict[str, Any]) -> str:
    return f"{row['reached']} of {row['n']}" if row["reached"] else "-"


def _lengths(rows: Sequence[dict[str, Any]]) -> list[int]:
    return sorted({row["rounds"] for row in rows})


def _both(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether some run tests its global model and clients' own ones."""
    return any(row["personal_accuracy"] is not None and not row["personal"] for row in rows)


def _unfinished(rows: Sequence[dict[str, Any]]) -> bool:
    return any(row["status"] != "done" for row in rows)


def _common(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What must be known to read the table: what is common to its runs, and what is not."""
    names, _ = _short_names(rows)
    pooled = [name for name, row in zip(names, rows, strict=True) if row["partition"] == POOLED]
    personal = [name for name, row in zip(names, rows, strict=True) if row["personal"]]
    split = [row for row in rows if row["partition"] != POOLED] or rows
    alike = len({(row["split_sha256"], row["pool_sha256"]) for row in split}) == 1
    said = [f"same split yes ({str(split[0]['split_sha256'])[:4]})" if alike else "same split NO"]
    if pooled:
        said.append(f"same examples {_yes(len({row['pool_sha256'] for row in rows}) == 1)}")
    said.append(f"same init {_yes(_same_init(rows))}")
    said += [f"same {word} {_yes(len({row[key] for row in rows}) == 1)}" for word, key in _SAME]
    if len(_lengths(rows)) > 1:
        said.append(f"same rounds NO ({', '.join(f'{n:g}' for n in _lengths(rows))})")
    if any(row["n"] > 1 for row in rows):
        many = {row["n"] for row in rows}
        said.append(f"± is the deviation over {f'{min(many)} ' if len(many) == 1 else ''}seeds (n - 1)")
        if len({tuple(sorted(row["seeds"])) for row in rows}) > 1:
            said.append("same seeds NO")
    if _targeted(rows):
        said.append(f"to {rows[0]['target']:g}: bytes both ways until a tested round has this accuracy (--target)")
        if any(0 < row["reached"] < row["n"] for row in rows):
            said.append("1 of 2: so many seeds reached it")
    front = [name for name, row in zip(names, rows, strict=True) if row["pareto"]]
    if len(rows) > 1 and front:
        which = "all" if len(front) == len(rows) else ", ".join(front)
        said.append(f"pareto ({'accuracy' if _accuracy(rows) else 'loss'}, total bytes): {which}")
    if pooled:
        said.append(f"{', '.join(pooled)}: pooled, one client with all examples")
    if personal:
        said.append(f"{', '.join(personal)}: acc is the mean of the clients' own models")
    return said


def _yes(x: bool) -> str:
    return "yes" if x else "NO"


def _same_init(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether runs of one seed begin with one model; where two rows have no seed in common, theirs differ."""
    of_seed = [dict(zip(row["seeds"], row["initial_sha256"], strict=True)) for row in rows]
    return all(
        any(seed in b for seed in a) and all(a[seed] == b[seed] for seed in a if seed in b)
        for a, b in itertools.combinations(of_seed, 2)
    )
