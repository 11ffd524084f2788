"""S3, S4, S7, S8: what is nowhere in the source, secrets, names of strangers, paths and links. Each is a file of tests.

The short form is what `make test` runs of it; the full one has the slow tests, too, and those with Flower's programs.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from soak import Result, row

ROOT = Path(__file__).parents[2]


def tested(file: str, short: bool) -> Result:
    words = [sys.executable, "-m", "pytest", f"tests/{file}", "-q", "-p", "no:cacheprovider", "--no-header"]
    words += [] if short else ["-m", "not gpu and not network"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=3000)
    told = done.stdout.strip().splitlines()
    marks = "".join(found[1] for line in told if (found := re.match(r"([.sFEx]+)\s+\[\s*\d+%\]", line)))
    passed, skipped = marks.count("."), marks.count("s")
    figure = f"{passed} of {len(marks) - skipped} tests"
    notes = "" if done.returncode == 0 else (told[-1] if told else done.stderr[-200:])
    return Result(figure, done.returncode == 0 and passed > 0, f"{skipped} left out: {notes}" if skipped else notes)


@row("S3", goal="nothing that is read can run, nothing goes to a shell: 0 hits but the one unpickler", minutes=2)
def static(short: bool) -> Result:
    return tested("test_static.py", short)


@row("S4", goal="0 canaries in run folder, logs, report, command lines, terminal, crash", minutes=10)
def secrets(short: bool) -> Result:
    return tested("test_secrets.py", short)


@row("S7", "csv-latex", goal="0 formulas, 0 commands, 0 broken rows of 60 and more payloads", minutes=2)
def injection(variant: str, short: bool) -> Result:
    return tested("test_injection.py", short)


@row("S8", goal="0 writes outside the run folder and the cache, by the files there and by strace", minutes=5)
def paths(short: bool) -> Result:
    return tested("test_paths.py", short)
