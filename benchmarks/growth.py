"""A federation of a million clients: seconds to start, memory, seconds per round, against the number of clients.

    OMP_NUM_THREADS=1 python benchmarks/growth.py [--clients N ...] [--rounds 2000] [--engine stacked] [--folder DIR]

60,000 random examples of 64 numbers in ten classes are one pool; each client holds 5 to 15 of them by index, so what
grows with the clients is their index alone. An MLP of 2,410 parameters is trained by 100 clients a round, one pass in
batches of 8, in one process (engine "stacked" with one worker). All rounds go through `fit`: logs, and checkpoints as
often as costs a twentieth of the time. Each line is a process of its own:

- index: of names, offsets and indices, made before anything is measured
- Federation, start: seconds from there to the end of `Federation(...)`, the check of the data included, and to the run
  folder with its split.json
- MiB: resident beyond that, after so many rounds; and at the peak, the start and the checkpoints included
- ms per round: median of the last 100, without checkpoints; that of the processor also where others are at work
- clients known: that have taken part; commit: seconds of a checkpoint at the end
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COUNTS = (1_000, 10_000, 100_000, 1_000_000)
EXAMPLES, WIDTH, CLASSES = 60_000, 64, 10


def memory(field: str) -> float:
    """Resident MiB of this process, which does all the work: VmRSS now, VmHWM at the peak. Linux."""
    found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, f"there is no {field}"
    return int(found[1]) / 1024


class Looker:
    """What a run is like after so many rounds."""

    def __init__(self, every: int):
        self.every = every
        self.began = time.perf_counter()
        self.made = 0.0  # seconds until the folder is there
        self.seconds: list[float] = []
        self.busy: list[float] = []  # of the processor
        self._at = 0.0
        self.mib: dict[int, float] = {}

    def begin(self, run: object, fed: object) -> None:
        self.made = time.perf_counter() - self.began

    def round(self, row: object) -> None:
        self.seconds.append(row.seconds)  # type: ignore[attr-defined]
        self.busy.append(time.process_time() - self._at)
        self._at = time.process_time()
        if len(self.seconds) == 20 or len(self.seconds) % self.every == 0:
            self.mib[len(self.seconds)] = memory("VmRSS")

    def note(self, text: str) -> None:
        pass

    def end(self, run: object) -> None:
        pass


def one(clients: int, rounds: int, engine: str, folder: Path) -> dict[str, object]:
    import torch

    import lamina
    from lamina import checkpoint

    source = torch.Generator().manual_seed(0)
    x, y = torch.randn(EXAMPLES, WIDTH, generator=source), torch.randint(CLASSES, (EXAMPLES,), generator=source)
    model = lamina.models.mlp((WIDTH, 32, CLASSES))
    model(x[:8]).sum().backward()  # torch's own memory, before anything is measured
    before = memory("VmRSS")
    sizes = torch.randint(5, 16, (clients,), generator=source)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    indices = torch.randint(EXAMPLES, (int(offsets[-1]),), generator=source)
    names = tuple(map(str, range(clients)))
    del sizes
    base = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    began = time.perf_counter()
    data = lamina.ClientData(x, y, names, offsets, indices, test=(x[:1000], y[:1000]))
    local = lamina.LocalSGD(lr=0.05, batch_size=8)
    fed = lamina.Federation(model, data, cohort=min(100, clients), local=local, engine=engine, workers=1)
    made = time.perf_counter() - began
    looker = Looker(every=max(1, rounds // 4))
    run = fed.fit(rounds, folder / "run", evaluate_every=rounds, progress=looker)
    peak = memory("VmHWM") - base
    began = time.perf_counter()
    checkpoint.commit(run.state, folder / "again")
    commit = time.perf_counter() - began
    return {
        "engine": f"{fed.engine} x{fed.workers}",
        "data": base - before,
        "made": made,
        "start": made + looker.made,
        "split": (folder / "run" / "split.json").stat().st_size / 2**20,
        "mib": {n: mib - base for n, mib in looker.mib.items()},
        "peak": peak,
        "s/round": [statistics.median(times[-100:]) for times in (looker.seconds, looker.busy)],
        "known": len(run.state.clients),
        "commit": commit,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--engine", default="stacked")
    parser.add_argument("--folder", type=Path, help="where runs are made; default: the system's temporary folder")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.one, arguments.rounds, arguments.engine, arguments.folder)))
        return
    quarter = max(1, arguments.rounds // 4)
    points = sorted({min(20, arguments.rounds), *(quarter * i for i in range(1, 5))})
    columns = (
        "clients", "index, MiB", "Federation, s", "start, s", "split.json, MiB",
        *(f"MiB at round {n:,}" for n in points), "peak, MiB",
        "ms per round", "of the processor", "clients known", "commit, s",
    )  # fmt: skip
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for clients in arguments.clients:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            command = [sys.executable, __file__, "--one", str(clients), "--folder", folder]
            command += ["--rounds", str(arguments.rounds), "--engine", arguments.engine]
            out = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        cells = [
            f"{clients:,}",
            f"{out['data']:.0f}",
            f"{out['made']:.2f}",
            f"{out['start']:.2f}",
            f"{out['split']:.1f}",
        ]
        cells += [f"{out['mib'][str(n)]:.0f}" for n in points]
        times = [f"{1000 * seconds:.1f}" for seconds in out["s/round"]]
        cells += [f"{out['peak']:.0f}", *times, f"{out['known']:,}", f"{out['commit']:.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
