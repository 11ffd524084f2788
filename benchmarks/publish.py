"""Puts the tables of benchmarks/parity where people read them: its README, and the methods' pages.

    python benchmarks/publish.py

A page says where: between ``<!-- parity: NAME NAME ... -->`` and ``<!-- /parity -->`` stands what this script writes.
A test compares the pages with the tables.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TABLES = ROOT / "benchmarks" / "parity"
PAGES = ROOT / "docs" / "methods"
MARK = re.compile(r"<!-- parity: ([\w -]+) -->\n.*?<!-- /parity -->", re.DOTALL)
VERDICTS = {True: "held", False: "did not hold", None: "cannot be judged"}


def page(text: str) -> str:
    """A method's page with its sections as the tables have them."""
    return MARK.sub(lambda found: f"<!-- parity: {found[1]} -->\n{sections(found[1].split())}\n<!-- /parity -->", text)


def sections(names: list[str]) -> str:
    made = [section(name) for name in names if (TABLES / f"{name}-scaled.json").exists()]
    return "\n\n".join(made) or "Not measured yet."


def section(name: str) -> str:
    table = read(name)
    lines = [
        f"### Measured: {name}, scaled",
        "",
        f"`{table['command']}`",
        "",
        f"Scaled: {table['scaled']}. What differs, and the whole table:",
        f"[benchmarks/parity/{name}-scaled.md](../../benchmarks/parity/{name}-scaled.md).",
        "",
        f"| arm | accuracy | up, {table['reference']} = 100 % | down |",
        "|---|---|---|---|",
    ]
    for label, arm in table["arms"].items():
        up, down = (percent(arm.get(f"bytes_{way}_relative")) for way in ("up", "down"))
        lines.append(f"| {label} | {accuracy(arm['accuracy'])} | {up} | {down} |")
    lines += ["", *(f"- **{VERDICTS[c['held']]}**: {c['text']} {c['words']}." for c in table["claims"])]
    return "\n".join(lines)


def accuracy(number: dict[str, float | None]) -> str:
    if number["mean"] is None:
        return "diverged"
    return f"{number['mean']:.4f}" + ("" if number["deviation"] is None else f" ± {number['deviation']:.4f}")


def percent(x: float | None) -> str:
    return "-" if x is None else f"{100 * x:.1f} %" if x >= 0.01 else f"{100 * x:.2g} %"


def overview() -> str:
    """The README of the tables."""
    rows = []
    for file in sorted(TABLES.glob("*-scaled.json")):
        table = read(file.stem.removesuffix("-scaled"))
        held = [claim["held"] for claim in table["claims"]]
        counted = [f"{held.count(verdict)} {word}" for verdict, word in VERDICTS.items() if verdict in held]
        reached = table["arms"][table["reference"]]["accuracy"]["mean"]
        minutes = sum(run["seconds"] for arm in table["arms"].values() for run in arm["runs"]) / 60
        rows.append(
            f"| [{file.stem}]({file.stem}.md) | {len(table['arms'])} | {', '.join(map(str, table['seeds']))} | "
            f"{100 * reached:.2f} % (floor {100 * table['floor']:.0f} %) | {', '.join(counted)} | {minutes:.0f} min |"
        )
    return "\n".join([*_HEAD, *rows, "", *_FOOT, ""])


def read(name: str) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((TABLES / f"{name}-scaled.json").read_text(encoding="utf-8"))
    return table


_HEAD = """# What became of the papers' claims, at a size that two cores can train

Each table was written by `lamina reproduce NAME --scaled --seeds ...` (the command, commit and hardware stand in it)
and lies here as Markdown and as JSON. The settings are smaller than published, and every table says how; its reference
had to reach an accuracy stated in the recipe beforehand, the floor. That a claim did not hold at this size is a result
about this size: it says neither that the paper is wrong nor that it is right.

| table | arms | seeds | reference | claims | training |
|---|---|---|---|---|---|""".splitlines()
_FOOT = """Training times are of runs that shared the machine with other work. With one seed a difference has no error
bar; differences of a point or two are within what another seed may give. This page is written by
`benchmarks/publish.py`.""".splitlines()


def main() -> None:
    (TABLES / "README.md").write_text(overview(), encoding="utf-8")
    for path in sorted(PAGES.glob("*.md")):
        path.write_text(page(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
