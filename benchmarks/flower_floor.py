"""Our part of a round over Flower, beyond what Flower itself takes.

    python benchmarks/flower_floor.py [--repeats 3] [--rounds 8] [--only resnet18,clients] [--folder DIR]

Ours and an echo app take turns, run for run, through the same SuperLink and SuperNodes on this machine. The echo app is
Flower's floor: it imports torch, is sent as many bytes as ours in one array, reads and writes as many on the node's
disk, and sends as many back as ours. Both wait for answers in the same way. A round is the time between two rounds'
ends at the server, the first of every run left out.

- resnet18: 11,173,962 parameters, fp32 both ways, a client on each node. One step on one image of 8 x 8: so what is
  left of training, of the order of 100 ms, counts as ours. The server saves a checkpoint in every round. Goal: < 1.10.
  The nodes' requests to the SuperLink are counted from its own log; goal: <= 20 + 3 per 5 MiB, per node and round
- clients: 16 clients on the nodes, a CNN of 184,586 parameters, against the simulator (engine "auto") on the same
  machine. Goal: < 1.3 times the simulator's round, plus the floor

SuperNodes ask for work every 3 s and for answers every 0.5 s, so single rounds jump by that much: look at the means of
many. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHUNK = 5 << 20  # bytes of an array in one of Flower's objects
POLL_S = 0.2
NODES = 2

# --- the echo app: this file is part of it, and so are two files that import one line each from here


def echo_server() -> Any:
    from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
    from flwr.serverapp import ServerApp

    app: Any = ServerApp()

    @app.main()
    def main(grid: Any, context: Any) -> None:
        keys = context.run_config
        while len([*grid.get_node_ids()]) < keys["nodes"]:
            time.sleep(POLL_S)
        with Path(keys["report"]).open("a") as report:
            for round in range(keys["rounds"]):
                blob = os.urandom(keys["down"])
                said = ConfigRecord({"up": keys["up"], "round": round})
                content = {"lamina": ArrayRecord({"packed": Array("uint8", (len(blob),), "echo", blob)}), "about": said}
                messages = [
                    Message(RecordDict(content), dst_node_id=node, message_type=MessageType.TRAIN)
                    for node in grid.get_node_ids()
                ]
                going = {*grid.push_messages(messages)}
                while going:
                    for reply in grid.pull_messages([*going]):
                        going.discard(reply.metadata.reply_to_message_id)
                        if reply.has_error():
                            raise RuntimeError(reply.error.reason)
                        assert len(reply.content.array_records["lamina"]["packed"].data) == keys["up"]
                    if going:
                        time.sleep(POLL_S)
                report.write(json.dumps({"event": "round", "round": round}) + "\n")
                report.flush()
            report.write(json.dumps({"event": "end", "exit_code": 0}) + "\n")

    return app


def echo_client() -> Any:
    import numpy as np
    import torch  # noqa: F401  # as every app that trains
    from flwr.app import Array, ArrayRecord, Message, RecordDict
    from flwr.clientapp import ClientApp

    app: Any = ClientApp()

    @app.train()
    def train(message: Any, context: Any) -> Any:
        blob = message.content.array_records["lamina"]["packed"].data
        kept = Path(context.node_config["state-dir"]) / "echo"
        if kept.exists():
            kept.read_bytes()
        kept.parent.mkdir(parents=True, exist_ok=True)
        with kept.with_name("echo.tmp").open("wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        kept.with_name("echo.tmp").replace(kept)
        up = int(message.content.config_records["about"]["up"])
        values = np.resize(np.frombuffer(blob, np.uint8), up) + np.uint8(1 + context.node_id % 255)  # no object twice
        array = Array("uint8", (up,), "echo", values.tobytes())
        return Message(RecordDict({"lamina": ArrayRecord({"packed": array})}), reply_to=message)

    return app


_PYPROJECT = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "echo"
version = "1.0.0"
description = "The floor"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "lamina"

[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"

[tool.flwr.app.config]
nodes = 1
rounds = 1
down = 1
up = 1
report = ""
"""


def write_echo(folder: Path) -> Path:
    folder.mkdir()
    shutil.copyfile(__file__, folder / "flower_floor.py")
    for side in ("server", "client"):
        (folder / f"{side}_app.py").write_text(f"from flower_floor import echo_{side}\n\napp = echo_{side}()\n")
    (folder / "pyproject.toml").write_text(_PYPROJECT)
    return folder


# --- what ours trains


def images(count: int, examples: int, *shape: int) -> Any:
    """Random ones, on so many clients."""
    import torch

    import lamina

    source = torch.Generator().manual_seed(0)
    x = torch.randn(count, examples, *shape, generator=source)
    y = torch.randint(10, (count, examples), generator=source)
    return lamina.ClientData.from_clients({str(c): (x[c], y[c]) for c in range(count)})


def two() -> Any:
    return images(2, 1, 3, 8, 8)


def sixteen() -> Any:
    return images(16, 600, 1, 28, 28)


WORKS = {
    "resnet18": ("two", 2, 'name = "resnet18"\nnorm = "group"'),
    "clients": ("sixteen", 16, 'name = "cnn"'),
}


def settings(work: str, rounds: int, folder: Path) -> Path:
    data, _, model = WORKS[work]
    path = folder / f"{work}.toml"
    entry = f"{Path(__file__).resolve()}:{data}"
    path.write_text(
        f'rounds = {rounds}\nevaluate_every = 1000\n[data]\nentry = "{entry}"\n[model]\n{model}\n'
        "[local]\nlr = 0.01\nbatch_size = 32\n"
    )
    return path


# --- measuring


def gaps(times: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(times)]


class Clock:
    """When rounds ended, and what was asked of the SuperLink between the first and the last of them."""

    def __init__(self, log: Path):
        self._log = log
        self.ends: list[float] = []
        self.asked: Counter[str] = Counter()
        self._before = 0

    def see(self, event: Mapping[str, Any]) -> None:
        if event["event"] != "round":
            return
        self.ends.append(time.perf_counter())
        text = self._log.read_text(errors="replace")
        if len(self.ends) == 1:
            self._before = len(text)
        self.asked = Counter(re.findall(r'"POST /v1/fleet/([a-z-]+)', text[self._before :]))

    @property
    def seconds(self) -> list[float]:
        return gaps(self.ends)


def ended(outcome: Any) -> Any:
    if outcome.exit_code:
        sys.exit(f"a run failed: {outcome.error}")
    return outcome


def ours(rehearsal: Any, app: Path, clients: int, folder: Path) -> tuple[Clock, dict[str, float]]:
    clock = Clock(rehearsal.link.log)
    keys = {"run-dir": str(folder / "runs"), "evaluate": False, "clients": clients}
    outcome = ended(rehearsal.wait(rehearsal.submit(app, keys), clock.see))
    rows = [json.loads(line) for line in (outcome.folder / "flower.jsonl").read_text().splitlines()][1:]
    carried = {key: statistics.mean(row[key] for row in rows) / rehearsal.count for key in ("packed_down", "packed_up")}
    shutil.rmtree(outcome.folder)
    return clock, carried


def echo(rehearsal: Any, app: Path, rounds: int, carried: Mapping[str, float]) -> Clock:
    clock = Clock(rehearsal.link.log)
    keys = {"rounds": rounds, "down": round(carried["packed_down"]), "up": round(carried["packed_up"])}
    ended(rehearsal.wait(rehearsal.submit(app, keys), clock.see))
    return clock


def simulated(path: Path, folder: Path) -> list[float]:
    from lamina import config, runs

    made = config.load(path, env={})
    ends: list[float] = []

    class Watch:
        def begin(self, run: Any, fed: Any) -> None:
            pass

        def round(self, row: Any) -> None:
            ends.append(time.perf_counter())

        def note(self, text: str) -> None:
            pass

        def end(self, run: Any) -> None:
            pass

    fed = config.build(made)
    run = runs.fit(fed, made.rounds, folder / "simulated", config=made, progress=Watch())
    shutil.rmtree(run.path)
    return gaps(ends)


def told(name: str, seconds: list[float]) -> None:
    middle, mean = statistics.median(seconds), statistics.mean(seconds)
    print(f"  {name:24} {mean:7.2f} s/round   median {middle:6.2f}, {min(seconds):.2f} to {max(seconds):.2f}, "
          f"{len(seconds)} rounds", flush=True)  # fmt: skip


def measure(work: str, rehearsal: Any, arguments: argparse.Namespace, folder: Path) -> None:
    from lamina import config
    from lamina.flower import project

    _, clients, _ = WORKS[work]
    path = settings(work, arguments.rounds, folder)
    app = folder / f"{work}-app"
    project.write(config.load(path, env={}), app)
    times: dict[str, list[float]] = {"echo": [], "ours": [], "simulator": []}
    asked: dict[str, list[Counter[str]]] = {"echo": [], "ours": []}
    for repeat in range(arguments.repeats):
        if work == "clients":
            times["simulator"] += simulated(path, folder)
        clock, carried = ours(rehearsal, app, clients, folder)
        floor = echo(rehearsal, folder / "echo", arguments.rounds, carried)
        for name, part in (("ours", clock), ("echo", floor)):
            times[name] += part.seconds
            asked[name].append(part.asked)
            print(f"    {repeat} {name}: {' '.join(f'{s:.2f}' for s in part.seconds)}", flush=True)
    down, up = carried["packed_down"], carried["packed_up"]
    print(f"{work}: {down:,.0f} bytes down and {up:,.0f} up for each of {rehearsal.count} nodes and each round")
    for name, seconds in times.items():
        if seconds:
            told(name, seconds)
    mean = {name: statistics.mean(seconds) for name, seconds in times.items() if seconds}
    print(f"  ours / echo              {mean['ours'] / mean['echo']:7.3f}")
    if work == "clients":
        bound = 1.3 * mean["simulator"] + mean["echo"]
        print(f"  1.3 simulator + echo     {bound:7.2f} s/round: ours is {mean['ours'] / bound:.3f} of it")
    rounds = rehearsal.count * (arguments.rounds - 1) * arguments.repeats
    chunks = math.ceil(down / CHUNK) + math.ceil(up / CHUNK)
    for name, counters in asked.items():
        whole = sum(counters, Counter[str]())
        parts = ", ".join(f"{count / rounds:.1f} {what}" for what, count in whole.most_common())
        print(f"  {name}: {whole.total() / rounds:.1f} requests per node and round ({parts})")
    print(f"  goal: at most 20 + 3 x {chunks} = {20 + 3 * chunks}", flush=True)


@contextmanager
def kept(folder: Path | None) -> Iterator[Path]:
    """This folder, made; None: one that is removed."""
    if folder is not None:
        folder.mkdir(parents=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="lamina-floor-") as made:
        yield Path(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--only", default=",".join(WORKS))
    parser.add_argument("--folder", type=Path, help="for logs and states, not removed; default: one that is removed")
    arguments = parser.parse_args()
    from lamina.flower.rehearsal import Rehearsal

    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # a package that was installed is compiled already
    os.environ["FLWR_LOG_LEVEL"] = "DEBUG"  # so that the SuperLink's log has every request; for both apps
    with kept(arguments.folder) as folder:
        write_echo(folder / "echo")
        with Rehearsal(folder, NODES) as rehearsal:
            for work in arguments.only.split(","):
                measure(work, rehearsal, arguments, folder)


if __name__ == "__main__":
    main()
