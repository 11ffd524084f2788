"""Memory of a run whose clients' states are on disk, and what that costs in time.

    OMP_NUM_THREADS=1 python benchmarks/client_store.py [--engine processes] [--clients N ...] [--folder DIR]

Error feedback with a top-k uplink of density 0.01 keeps one model of state per client. An MLP of 198,760 parameters is
trained by every client in every round, one step each on its own 8 of 4,096 shared examples (so the data is small),
with a checkpoint after every round. Each line is a process of its own: its peak resident memory, that of it and its
worker processes together (the sum of their peaks, so that what they share counts once for each), the size of what holds
the rows of the last two checkpoints, and the seconds of each round, without the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

WORKS = (("memory", 1000), ("disk", 1000), ("disk", 10000))


def peak(process: int) -> float:
    """MiB of resident memory, Linux."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{process}/status").read_text())
    assert found is not None, f"process {process} has no VmHWM"
    return int(found[1]) / 1024


def one(kind: str, clients: int, rounds: int, engine: str, folder: Path) -> dict[str, object]:
    import torch

    import lamina
    from lamina import checkpoint

    source = torch.Generator().manual_seed(0)
    x, y = torch.randn(4096, 784, generator=source), torch.randint(10, (4096,), generator=source)
    groups = {str(c): torch.randint(4096, (8,), generator=source) for c in range(clients)}
    fed = lamina.Federation(
        lambda: lamina.models.mlp((784, 250, 10)),
        lamina.ClientData.from_index(x, y, groups),
        method=lamina.ErrorFeedback(),
        uplink=lamina.wire.TopK(0.01),
        local=lamina.LocalSGD(lr=0.05, batch_size=8),
        engine=engine,
        store="memory" if kind == "memory" else f"disk:{folder / 'clients'}",
    )
    seconds = []
    workers: dict[int, float] = {}
    for state, record in fed.run(rounds):
        checkpoint.commit(state, folder / "checkpoints")
        seconds.append(round(record.seconds, 1))
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()  # the engine's, still there
        workers |= {int(child): peak(int(child)) for child in children}
    files = (folder / ("clients" if kind == "disk" else "checkpoints")).rglob("*")
    own = peak(os.getpid())
    return {
        "MiB": own,
        "MiB of all": own + sum(workers.values()),
        "processes": 1 + len(workers),
        "GB on disk": sum(path.stat().st_size for path in files if path.is_file()) / 1e9,
        "s/round": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--engine", choices=("loop", "processes"), default="loop")
    parser.add_argument(
        "--clients", type=int, nargs="+", help="in memory and on disk; default: as in docs/client-state.md"
    )
    parser.add_argument("--folder", type=Path, help="where the stores are made; default: the system's temporary folder")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "CLIENTS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        kind, clients = arguments.one
        print(json.dumps(one(kind, int(clients), arguments.rounds, arguments.engine, arguments.folder)))
        return
    columns = ("store", "clients", "peak memory, MiB", "of all processes, MiB", "on disk, GB", "seconds per round")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    asked = arguments.clients and [(kind, clients) for clients in arguments.clients for kind in ("memory", "disk")]
    for kind, clients in asked or WORKS:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            command = [sys.executable, __file__, "--one", kind, str(clients), "--folder", folder]
            command += ["--rounds", str(arguments.rounds), "--engine", arguments.engine]
            out = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        times = ", ".join(map(str, out["s/round"]))
        memory = f"{out['MiB']:,.0f} | {out['MiB of all']:,.0f} ({out['processes']})"
        print(f"| {kind} | {clients:,} | {memory} | {out['GB on disk']:.1f} | {times} |", flush=True)


if __name__ == "__main__":
    main()
