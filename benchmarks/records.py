"""What the records cost: rounds with per-layer records, ledger and run folder beside the same rounds without.

    python benchmarks/records.py --works W1,W2,W3,W4 --rounds 20

Both take turns round for round in one process, with the engine that `auto` takes. With: diagnostics on (divergence and
the like need each client's sums of squares), every round's rows put together and written at the end as a commit does.
Without: `diagnostics=False`, no rows. The ledger of exact bytes is in both: it cannot be turned off.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from speed import WORKS, Work, load

import lamina
from lamina.engine.allocator import keep_memory
from lamina.folder import LOGS, Book


def rounds(work: Work, data: lamina.ClientData, count: int) -> tuple[list[float], list[float]]:
    """Seconds of each round, with and without."""
    fed = {
        kind: lamina.Federation(work.model, data, cohort=work.cohort, local=work.local, diagnostics=kind)
        for kind in (True, False)
    }
    going = {kind: fed[kind].run(10**9, evaluate_every=10**9) for kind in fed}
    for kind in fed:
        next(going[kind])
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        options = {"keep_clients_log": False}
        book = Book(Path(folder), {"options": options, "seconds": 0.0, "rounds_done": 0, "personal": False})
        for log in LOGS:
            (Path(folder) / log).touch()
        lengths = dict.fromkeys(LOGS, 0)
        book.info["lengths"] = lengths
        for i in range(count):
            for kind in (True, False) if i % 2 else (False, True):
                began = time.perf_counter()
                state, record = next(going[kind])
                if kind:
                    book.round(state, record, None)
                    book.info["lengths"] = book._written()
                    for lines in book._lines.values():
                        lines.clear()
                seconds[kind].append(time.perf_counter() - began)
    for generator in going.values():
        generator.close()
    return seconds[True], seconds[False]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", default="W1,W2,W2b,W3,W4")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    keep_memory()
    print("| work | with records, s/round | without | overhead, median of pairs |\n|---|---|---|---|")
    for name in options.works.split(","):
        work = WORKS[name]
        own, bare = rounds(work, load(work), options.rounds)
        pairs = [100 * (a / b - 1) for a, b in zip(own, bare, strict=True)]
        low, _, high = statistics.quantiles(pairs, n=4)
        medians = statistics.median(own), statistics.median(bare), statistics.median(pairs)
        print(
            f"| {name} | {medians[0]:.4f} | {medians[1]:.4f} | {medians[2]:+.1f} % ({low:+.1f} to {high:+.1f}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
