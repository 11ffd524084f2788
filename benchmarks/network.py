"""Rounds over slow links, and what the ledger lets one expect of them.

    sudo python benchmarks/network.py [--rates 100,10] [--cycles 6] [--methods NAME,...] [--folder DIR]

A rehearsal (SuperLink, two SuperNodes, TLS) whose SuperNodes are each in a network namespace of its own, behind a link
of its own: a veth pair, both ends slowed by `tc tbf` to so many Mbit/s. Linux, root and iproute2 are needed; everything
that is made is removed, and no process is left. What a plain TCP stream reaches on the first link is printed first.

A CNN of CIFAR-10's shapes (`pfl_cnn`, 1,626,442 parameters) on eight clients, four to a node, all of them in every
round, each with one step on random examples: how well it learns is not of interest here, only what travels and when.

    expected = measured without a limit + 8 x (plan + messages) / rate

with the bytes of a node's link from the ledger: a plan goes to a node once, however many clients it has there, and a
message comes from every client. No limit, 100 and 10 Mbit/s take turns, round for round, within one run of a method, so
that what else the machine does falls on all alike; the first round, which has Flower's start in it, is not counted. The
figures are means: SuperNodes ask for work every 3 s only. Rounds in their order are on stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

NODES, CLIENTS = 2, 8
Run: TypeAlias = "list[tuple[float, float, float]]"  # seconds, bytes down and up, of every round
MBIT = 1e6 / 8  # bytes
METHODS = {
    "FedAvg": (),
    "FedLAMA(phi=2)": ("method=fedlama", "method.phi=2"),
    "SSFL(density=0.5)": ("method=ssfl", "method.density=0.5"),
    "FLARE + topk:0.01": ("method=flare", "uplink=topk:0.01"),
}


def images() -> Any:
    """Random ones, of CIFAR-10's shapes."""
    import torch

    import lamina

    source = torch.Generator().manual_seed(0)
    x = torch.randn(CLIENTS, 10, 3, 32, 32, generator=source)
    y = torch.randint(10, (CLIENTS, 10), generator=source)
    return lamina.ClientData.from_clients({str(c): (x[c], y[c]) for c in range(CLIENTS)})


SETTINGS = f"""evaluate_every = 1000
[data]
entry = "{Path(__file__).resolve()}:images"
[model]
name = "pfl_cnn"
[local]
lr = 0.01
batch_size = 10
"""


def run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}")


class Links:
    """A bridge for the SuperLink, and a namespace with a link to it for every node. A context manager that leaves
    nothing behind."""

    def __init__(self, count: int):
        tag = f"lm{os.getpid() % 100_000}"
        self.address = "10.231.7.1"
        self.spaces = [f"{tag}-{i}" for i in range(count)]
        self._bridge = f"{tag}b"
        self._ends = [(f"{tag}o{i}", f"{tag}i{i}") for i in range(count)]  # outside, inside
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Links:
        try:
            self._make()
        except BaseException:
            self._undo.close()
            raise
        return self

    def __exit__(self, *exception: Any) -> None:
        self._undo.close()

    def _make(self) -> None:
        run("ip", "link", "add", self._bridge, "type", "bridge")
        self._undo.callback(run, "ip", "link", "del", self._bridge)
        run("ip", "addr", "add", f"{self.address}/24", "dev", self._bridge)
        run("ip", "link", "set", self._bridge, "up")
        for i, (space, (outside, inside)) in enumerate(zip(self.spaces, self._ends, strict=True)):
            run("ip", "netns", "add", space)
            self._undo.callback(run, "ip", "netns", "del", space)
            run("ip", "link", "add", outside, "type", "veth", "peer", "name", inside, "netns", space)
            self._undo.callback(run, "ip", "link", "del", outside)
            run("ip", "link", "set", outside, "master", self._bridge, "up")
            run("ip", "-n", space, "addr", "add", f"10.231.7.{i + 2}/24", "dev", inside)
            for device in (inside, "lo"):
                run("ip", "-n", space, "link", "set", device, "up")

    def slow(self, mbit: float | None) -> None:
        """Both directions of every link. None: as fast as the machine is."""
        for space, (outside, inside) in zip(self.spaces, self._ends, strict=True):
            for words, device in ((["tc"], outside), (["tc", "-n", space], inside)):
                if mbit is None:
                    subprocess.run([*words, "qdisc", "del", "dev", device, "root"], capture_output=True, check=False)
                    continue
                limit = ["tbf", "rate", f"{mbit:g}mbit", "burst", f"{max(32, int(mbit * 2))}kb", "latency", "200ms"]
                run(*words, "qdisc", "replace", "dev", device, "root", *limit)

    def inside(self, i: int) -> Sequence[str]:
        """What comes before a command to run it there."""
        return ("ip", "netns", "exec", self.spaces[i])

    def stream(self, size: int) -> float:
        """Mbit/s of a plain TCP stream from the first namespace."""
        import socket

        with socket.create_server((self.address, 0)) as server:
            port = server.getsockname()[1]
            code = f"import socket; s = socket.create_connection(('{self.address}', {port})); s.sendall(bytes({size}))"
            sender = subprocess.Popen([*self.inside(0), sys.executable, "-c", code])
            connection, _ = server.accept()
            began = got = time.perf_counter()
            with connection:
                while connection.recv(1 << 20):
                    got = time.perf_counter()
            sender.wait()
        return size / MBIT / (got - began)


def sent(folder: Path) -> dict[int, tuple[float, float]]:
    """Round -> (down, up), bytes of a node's link, from the ledger."""
    found: dict[int, list[float]] = {}
    for line in (folder / "bytes.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["phase"] == "round":
            up = row["direction"] == "up"
            found.setdefault(row["round"], [0.0, 0.0])[up] += row["bytes"] / (NODES if up else CLIENTS)
    return {round: (down, up) for round, (down, up) in found.items()}


def measured(rehearsal: Any, links: Links, app: Path, rates: Sequence[float | None], folder: Path) -> Run:
    """The links have another rate in every round, in turn."""
    ends: list[float] = []

    def see(event: dict[str, Any]) -> None:
        if event["event"] == "round":
            ends.append(time.perf_counter())
            links.slow(rates[event["round"] % len(rates)])  # for the next round

    links.slow(None)
    keys = {"run-dir": str(folder / "runs"), "evaluate": False, "clients": CLIENTS}
    outcome = rehearsal.wait(rehearsal.submit(app, keys), see)
    if outcome.exit_code:
        sys.exit(f"a run failed: {outcome.error}")
    lost = (outcome.folder / "events.jsonl").read_text()
    if lost:
        sys.exit(f"not every message came: {lost.splitlines()[0]}")
    travelled = sent(outcome.folder)
    shutil.rmtree(outcome.folder)
    return [(after - before, *travelled[t]) for t, (before, after) in enumerate(itertools.pairwise(ends), 1)]


def row(name: str, run: Run, rates: Sequence[float | None]) -> list[str]:
    down, up = (statistics.mean(part) / 1e6 for part in list(zip(*run, strict=True))[1:])
    told = [name, f"{down:.2f}", f"{up:.2f}"]
    full = 0.0
    for i, rate in enumerate(rates):
        mine = run[i :: len(rates)]
        seconds = statistics.mean(part[0] for part in mine)
        told.append(f"{seconds:.1f}")
        if rate is None:
            full = seconds
        else:
            told.append(f"{full + statistics.mean(d + u for _, d, u in mine) / (rate * MBIT):.1f}")
    return told


def table(
    rehearsal: Any, links: Links, rates: Sequence[float], names: Sequence[str], cycles: int, folder: Path
) -> None:
    from lamina import config
    from lamina.flower import project

    for rate in rates:
        links.slow(rate)
        plain = links.stream(int(rate * MBIT * 3))
        print(f"{rate:g} Mbit/s: a plain TCP stream has {plain:.1f} Mbit/s", flush=True)
    head = ["method", "MB down", "MB up", "no limit", *(f"{r:g} Mbit/s{x}" for r in rates for x in ("", ", expected"))]
    print("| " + " | ".join(head) + " |\n|---" + "|---:" * (len(head) - 1) + "|", flush=True)
    (folder / "net.toml").write_text(SETTINGS)
    every = (None, *rates)
    for i, name in enumerate(names):
        keys = [f"rounds={1 + cycles * len(every)}", *METHODS[name]]
        app = folder / f"app-{i}"
        project.write(config.load(str(folder / "net.toml"), keys, env={}), app)
        run = measured(rehearsal, links, app, every, folder)
        print("| " + " | ".join(row(name, run, every)) + " |", flush=True)
        print(f"  {' '.join(f'{seconds:.1f}' for seconds, _, _ in run)}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", default="100,10", help="Mbit/s, both directions of each node's link")
    parser.add_argument("--cycles", type=int, default=6, help="rounds at each rate; even, for the rhythm of phi=2")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--folder", type=Path, help="for logs, not removed; default: one that is removed")
    arguments = parser.parse_args()
    if os.geteuid() or not (shutil.which("ip") and shutil.which("tc")):
        sys.exit("network namespaces need root, and ip and tc of iproute2")
    from lamina.flower.rehearsal import Rehearsal

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))  # so that what was made is removed
    from flower_floor import kept  # here: nodes load this file for `images`, without its neighbours

    with kept(arguments.folder) as folder, Links(NODES) as links:
        os.environ["NO_PROXY"] = ",".join(filter(None, [os.environ.get("NO_PROXY", ""), links.address]))
        with Rehearsal(folder, NODES, tls=True, host=links.address, node_words=links.inside) as rehearsal:
            rates = [float(rate) for rate in arguments.rates.split(",")]
            table(rehearsal, links, rates, arguments.methods.split(","), arguments.cycles, folder)


if __name__ == "__main__":
    main()
