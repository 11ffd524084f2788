"""The reliability table: each row in full, stored with its commit, and not run again for that commit.

    python benchmarks/reliability.py                  all rows that have no result for this commit, then the table
    python benchmarks/reliability.py --row R1:fedlama one row (or R1: all its variants), again if it has one
    python benchmarks/reliability.py --short          the short forms, seconds each; nothing is stored
    python benchmarks/reliability.py --table          the table of the stored results

A result is benchmarks/reliability/<row>.json. The table says of which commit each figure is.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
STORED = HERE / "reliability"
sys.path.insert(0, str(HERE))

from soak import Result, Row, every  # noqa: E402


def commit(row: Row) -> str:
    """The last commit that touched what the row tries or the file that tries it; "+changes" when the working tree
    differs from it."""
    places = ["src", *(f"benchmarks/soak/{name}.py" for name in needed(row.area))]
    root = HERE.parent
    made = subprocess.run(["git", "log", "-1", "--format=%h", "--", *places], cwd=root, capture_output=True, text=True)
    dirty = subprocess.run(["git", "status", "--porcelain", "--", *places], cwd=root, capture_output=True, text=True)
    return made.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def needed(area: str) -> set[str]:
    """The files of soak that this one imports, and itself."""
    found, new = set[str](), {area}
    while new:
        found |= new
        text = "".join((HERE / "soak" / f"{name}.py").read_text() for name in new)
        words = {word for line in re.findall(r"^from soak(.*)$", text, re.M) for word in re.findall(r"\w+", line)}
        new = {word for word in words if (HERE / "soak" / f"{word}.py").is_file()} - found
    return found


def place(row: Row) -> Path:
    return STORED / f"{row.name.replace(':', '-')}.json"


def stored(row: Row) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(place(row).read_text())
        return found
    except (OSError, ValueError):
        return None


def measured(row: Row, short: bool) -> dict[str, Any]:
    began = time.monotonic()
    try:
        result = row.run(short)
    except Exception:
        traceback.print_exc()
        result = Result("it failed", False, traceback.format_exc(limit=-1).strip().splitlines()[-1])
    seconds = round(time.monotonic() - began, 1)
    return {"row": row.name, "goal": row.goal, **result._asdict(), "seconds": seconds, "commit": commit(row),
            "python": platform.python_version()}  # fmt: skip


def table(results: list[dict[str, Any]]) -> str:
    lines = ["| row | goal | reached | | minutes | commit |", "|---|---|---|---|---|---|"]
    for r in results:
        figure = r["figure"] + (f" ({r['notes']})" if r["notes"] else "")
        met = "met" if r["met"] else "**not met**"
        lines.append(f"| {r['row']} | {r['goal']} | {figure} | {met} | {r['seconds'] / 60:.1f} | {r['commit']} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", default="", help="R1, or R1:fedlama")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    rows = [r for r in every() if not options.row or options.row in (r.id, r.name)]
    if not rows:
        print(f"there is no row {options.row!r}", file=sys.stderr)
        return 2
    results = []
    for row in rows:
        found = stored(row)
        fresh = found is not None and found["commit"] == commit(row) and not options.row
        if not (options.table or (fresh and not options.short)):
            print(f"{row.name}: {row.goal}", flush=True)
            found = measured(row, options.short)
            if not options.short:
                STORED.mkdir(exist_ok=True)
                place(row).write_text(json.dumps(found, indent=1) + "\n")
        if found is not None:
            results.append(found)
            print(f"  {found['figure']}  {'met' if found['met'] else 'NOT MET'}  {found['seconds']} s", flush=True)
    print("\n" + table(results))
    return 0 if all(r["met"] for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
